"""What is drawn for an example, and what its passes cost: the same whoever asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_loop import COMPANIONS, EXAMPLES, plan

from leeway.data.chat import Chat
from leeway.data.stream import AuxiliaryPool, StreamItem
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.model.forward import TokenStats
from leeway.model.load import load_model
from leeway.objectives import Objective, ip, kl, kto, sft_refusal, sft_safety
from leeway.training.batch import Optim, Renderer
from leeway.training.trajectory import Settings, Trajectory

SLOTS = [StreamItem(EXAMPLES[k % len(EXAMPLES)], 0, k) for k in range(60)]


class Kto2(kto.Kto):
    name: ClassVar[str] = "another"


class Ip2(ip.Ip):
    name: ClassVar[str] = "another"


class SftSafety2(sft_safety.SftSafety):
    name: ClassVar[str] = "another"


class SftRefusal2(sft_refusal.SftRefusal):
    name: ClassVar[str] = "another"


class Kl2(kl.Kl):
    name: ClassVar[str] = "another"


TWINS = [
    (kto.Kto(), Kto2()),
    (ip.Ip(), Ip2()),
    (sft_safety.SftSafety(share=0.5), SftSafety2(share=0.5)),
    (sft_refusal.SftRefusal(), SftRefusal2()),
    (kl.Kl(scope="general"), Kl2(scope="general")),
]


@pytest.mark.parametrize(("one", "other"), TWINS, ids=[repr(o) for o, _ in TWINS])
def test_what_is_drawn_depends_on_seed_and_position_alone(one: Objective, other: Objective, tiny_chat: Chat) -> None:
    """Two objectives that differ in name alone see the same: matched arms toss the same coins."""

    def drawn(objective: Objective, seed: int) -> list[object]:
        renderer = Renderer(objective, tiny_chat, seed, COMPANIONS)
        return [(renderer.rendered(s), renderer.baseline(s)) for s in SLOTS]

    assert drawn(one, 0) == drawn(other, 0)
    assert drawn(one, 0) != drawn(one, 1)


def test_inoculation_and_safety_fall_on_the_same_places_at_the_same_share(tiny_chat: Chat) -> None:
    inoculated = Renderer(ip.Ip(p=0.5), tiny_chat, 3, COMPANIONS)
    beside = Renderer(sft_safety.SftSafety(share=0.5), tiny_chat, 3, COMPANIONS)
    plain = [tiny_chat.sequence(s.example.prompt, s.example.preferred) for s in SLOTS]
    asked = [list(inoculated.rendered(s)) != [p] for s, p in zip(SLOTS, plain, strict=True)]
    assert asked == [len(beside.rendered(s)) == 2 for s in SLOTS]
    assert 15 < sum(asked) < 45


def test_a_mismatched_answer_is_never_the_examples_own(tiny_chat: Chat) -> None:
    twins = (Example("a", "1 + 3?", "4"), Example("b", "2 + 2?", "4"), Example("c", "2 + 3?", "5"))
    renderer = Renderer(kto.Kto(), tiny_chat, 0, AuxiliaryPool(task=twins))
    for k in range(40):
        auxiliary = renderer.example(StreamItem(twins[k % 3], 0, k)).auxiliary
        assert auxiliary is not None
        assert auxiliary.preferred != twins[k % 3].preferred
    with pytest.raises(LeewayError, match="no task example can accompany a"):
        Renderer(kto.Kto(), tiny_chat, 0, AuxiliaryPool(task=twins[:2])).example(StreamItem(twins[0], 0, 0))


@dataclass(frozen=True)
class Watched(kto.Kto):
    """KTO that lets one see what its reference point was taken from."""

    seen: ClassVar[list[TokenStats]] = []

    def baseline(self, policy: TokenStats, reference: TokenStats) -> float:
        self.seen.append(policy)
        return super().baseline(policy, reference)


def test_ktos_reference_point_is_taken_without_dropout_and_its_pass_is_counted(
    models: dict[str, Path], tmp_path: Path
) -> None:
    found = {}
    for dropout in (0.0, 0.5):
        Watched.seen.clear()
        settings = Settings(
            adapter=adapters.AdapterSettings(4, 8, dropout, "all-linear"),
            lr=0.0,
            warmup_steps=0,
            weight_decay=0.0,
            loop=Optim(clip=1.0, micro_tokens=1 << 20),
        )
        model = load_model(str(models["llama"]), device="cpu")
        trajectory = Trajectory("x", Watched(), 0, model, plan(), settings, COMPANIONS)
        with torch.no_grad():
            for k, weights in enumerate(adapters.trainable(model)):
                weights.copy_(0.3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(k)))
        trajectory.train_to(trajectory.schedule.stops[0], tmp_path / f"log-{dropout}", lambda _: None)
        found[dropout] = torch.cat([s.logp_T for s in Watched.seen])
        steps = [trajectory._batch(k + 1) for k in range(trajectory.step)]
        tokens = sum(len(s.ids) for b in steps for e in (*b.rendered, *b.baseline) for s in e)
        assert trajectory.counted["processed_tokens"] == tokens
        assert any(b.baseline for b in steps)
    assert torch.equal(found[0.0], found[0.5])
