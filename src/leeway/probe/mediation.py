"""Does the refusal direction carry the change in attack success?

While the checkpoint answers, the base's component along the direction is put back after every block, at every token:

    h ← h + r̂ r̂ᵀ(h_base − h),

with h_base the base's states on the same tokens. The study's own jailbreak eval asks and judges, so a value is an
attack success. The share of the change that is undone, [ASR(ckpt) − ASR(put back)] / [ASR(ckpt) − ASR(base)], is held
against a random direction in place of r̂, another one for every prompt. Ours.

Both models decode in step, in plain transformers: the base first, for its components, then the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leeway.evals.eval import Row
from leeway.evals.jailbreak import Jailbreak
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.hashing import digest
from leeway.probe.context import BATCH, ProbeContext, Value, random_units
from leeway.probe.hooks import Edit, Point, edited
from leeway.probe.pair import ModelPair, Side
from leeway.probe.passes import PromptBatch, attention_mask

ARMS = ("base", "checkpoint", "put back", "random")


def measure(context: ProbeContext) -> list[Value]:
    """Return every test prompt's attack success under each attack and arm; unscored answers have a reason.

    Rows of `mediation`: detail is the attack, value the success of the checkpoint minus that with r̂ put back, control
    the same with a random direction, scale the success of the checkpoint minus the base's.
    """
    assert context.directions is not None
    jailbreak: Jailbreak | None = context.extras.get("jailbreak")
    if jailbreak is None:
        return [Value("mediation", reason="the study has no jailbreak eval")]
    ids = [p.id for p in context.prompts.of("test", "harmful")]
    asked = jailbreak.part(ids)
    asked = asked._of(asked.items[: context.extras.get("mediation_prompts", len(asked.items))])
    unit_D = context.directions.unit_D
    arms: dict[str, list[Row]] = {}
    for arm in ARMS:
        direction_D = unit_D if arm in ("put back", "random") else None
        backend = StepwiseBackend(context.pair, context.prefix, arm == "base", direction_D, arm == "random")
        arms[arm] = [r for r in asked.run(backend, lambda *_: None) if r.judge == asked.judges[0].name]
    found: list[Value] = []
    for rows in zip(*(arms[a] for a in ARMS), strict=True):
        own = rows[0]
        if failed := next((r.unscored_reason for r in rows if r.unscored_reason), None):
            found.append(Value("mediation", own.item_id, "harmful", own.attack, reason=f"unscored: {failed}"))
            continue
        base, tuned, back, random = (r.score for r in rows)
        values = {"value": tuned - back, "control": tuned - random, "scale": tuned - base}
        found.append(Value("mediation", own.item_id, "harmful", own.attack, **values))
    return found


@dataclass
class StepwiseBackend:
    """Greedy answers of one side, or of the checkpoint with the base's component along a direction put back.

    `random`: along a random direction in its place, drawn from a conversation's first message.
    """

    pair: ModelPair
    prefix: str
    of_base: bool = False
    direction_D: Tensor | None = None
    random: bool = False
    batch: int = BATCH
    _unit_BD: Tensor | None = field(default=None, repr=False)
    _base_L: list[Tensor] = field(default_factory=list, repr=False)  # h_base · r̂ after each block, [B, Q]

    @property
    def identity(self) -> str:
        given = None if self.direction_D is None else [float(x) for x in self.direction_D]
        return digest("stepwise", self.pair.checkpoint.model.hash, self.prefix, self.of_base, given, self.random)

    @property
    def template_hash(self) -> str:
        return self.pair.checkpoint.model.chat.with_prefix(self.prefix).template_hash

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """Return one greedy reply per request."""
        chat = self.pair.checkpoint.model.chat.with_prefix(self.prefix)
        ids = [chat.prompt_ids(list(r.conversation)) for r in requests]
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        replies: list[Reply | None] = [None] * len(ids)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            limit = max(requests[i].max_new_tokens for i in chosen)
            self._unit_BD = self._units([requests[i].conversation for i in chosen])
            answers = self._decode([ids[i] for i in chosen], limit)
            for i, answer in zip(chosen, answers, strict=True):
                own = answer[: requests[i].max_new_tokens]
                replies[i] = Reply(chat.decode(own), len(own), cut=len(own) == requests[i].max_new_tokens)
            tick(len(chosen))
        return [r for r in replies if r is not None]

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        raise NotImplementedError("a probe generates; it scores no options")

    @torch.no_grad()
    def _decode(self, ids: Seq[tuple[int, ...]], limit: int) -> list[list[int]]:
        from transformers import DynamicCache

        sides = self._sides()
        stop = set(sides[-1].model.stop_ids) | set(sides[-1].model.chat.stop_ids)
        batch = PromptBatch.of(ids, None, sides[-1].model.device)
        caches = [DynamicCache() for _ in sides]
        answers: list[list[int]] = [[] for _ in ids]
        open_rows = set(range(len(ids)))
        ids_BQ, position_BL, sees_BQL = batch.ids_BL, batch.position_BL, batch.sees_BLK
        for _ in range(limit):
            hidden_BD = self._step(sides, caches, ids_BQ, position_BL, sees_BQL)
            token_B = sides[-1].model.head.logits(hidden_BD).argmax(-1)
            for row in sorted(open_rows):
                if int(token_B[row]) in stop:
                    open_rows.discard(row)
                else:
                    answers[row].append(int(token_B[row]))
            if not open_rows:
                break
            ids_BQ, position_BL = token_B[:, None], torch.cat([position_BL, position_BL[:, -1:] + 1], 1)
            grown = torch.ones(len(ids), 1, 1, dtype=torch.bool, device=token_B.device)
            sees_BQL = torch.cat([sees_BQL[:, -1:], grown], 2)
        return answers

    def _units(self, conversations: Seq[Conversation]) -> Tensor | None:
        if self.direction_D is None or not self.random:
            return None if self.direction_D is None else self.direction_D.expand(len(conversations), -1)
        return random_units(len(self.direction_D), "mediation", prompts=[str(c[0]["content"]) for c in conversations])

    def _sides(self) -> list[Side]:
        if self.of_base:
            return [self.pair.base]
        return [self.pair.checkpoint] if self.direction_D is None else [self.pair.base, self.pair.checkpoint]

    def _step(
        self, sides: list[Side], caches: list[object], ids_BQ: Tensor, position_BL: Tensor, sees_BQL: Tensor
    ) -> Tensor:
        """Run one step on every side in turn; return the last side's final hidden states, [B, D]."""
        dtype, position_BQ = sides[-1].model.head.weight_VD.dtype, position_BL[:, -ids_BQ.shape[1] :]
        mask = attention_mask(sides[-1].blocks.decoder, dtype, sees_BQL, position_BQ, position_BL)
        self._base_L = []
        for side, cache in zip(sides, caches, strict=True):
            with side.active(), edited(side.blocks, self._edits(side, side is sides[-1] and len(sides) > 1)):
                out = side.blocks.decoder(
                    input_ids=ids_BQ,
                    attention_mask=mask,
                    position_ids=position_BQ,
                    past_key_values=cache,
                    use_cache=True,
                )
        hidden_BQD: Tensor = out.last_hidden_state
        return hidden_BQD[:, -1]

    def _edits(self, side: Side, put_back: bool) -> dict[Point, Edit]:
        """Return the hooks that note the base's component after each block, or put it back."""
        if self._unit_BD is None:
            return {}
        unit_B1D, layers = self._unit_BD[:, None], range(len(side.blocks))

        def along(x_BQD: Tensor) -> Tensor:
            found_BQ: Tensor = (x_BQD * unit_B1D.to(x_BQD)).sum(-1)
            return found_BQ

        def note(x_BQD: Tensor) -> Tensor:
            self._base_L.append(along(x_BQD))
            return x_BQD

        def restore(layer: int) -> Edit:
            return lambda x_BQD: x_BQD + (self._base_L[layer] - along(x_BQD))[..., None] * unit_B1D.to(x_BQD)

        return {(layer, "resid"): restore(layer) if put_back else note for layer in layers}
