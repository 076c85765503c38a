"""The prompts of a probe: harmful and harmless ones, split into those that make a direction and those that test it.

Test prompts come from the study's own jailbreak prompts, so that states and attack success are about the same prompts.
Prompts for directions come from the rest of the same source; no prompt is in two sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from leeway.data import safety_prompts
from leeway.data.chat import Chat
from leeway.data.readers import Source, field, load
from leeway.data.safety_prompts import subset
from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.io import expand
from leeway.organism import vocabulary, world

Kind = Literal["harmful", "harmless"]
Split = Literal["direction", "selection", "test"]
MIN_PROMPTS = 8  # of each kind and split

# Taori et al. 2023: instructions without forbidden requests. A local copy may be LLaMA-Factory's sample of it.
ALPACA = Source(("llamafactory_demo/alpaca_en_demo.json", "alpaca/alpaca_data.json"), "tatsu-lab/alpaca")


@dataclass(frozen=True)
class ProbePrompt:
    """One prompt; `category` is its source's kind of harm, empty if it names none."""

    id: str
    text: str
    kind: Kind
    category: str = ""


@dataclass(frozen=True)
class PromptSets:
    """Disjoint sets of prompts by split, harmful and harmless, and where they come from."""

    sets: Mapping[Split, tuple[ProbePrompt, ...]]
    origins: Mapping[str, str]

    def of(self, split: Split, kind: Kind) -> tuple[ProbePrompt, ...]:
        return tuple(p for p in self.sets[split] if p.kind == kind)

    @cached_property
    def hash(self) -> str:
        return digest(
            "probe prompts", {s: [(p.id, digest(p.text), p.kind) for p in own] for s, own in self.sets.items()}
        )


def split_prompts(
    harmful: Seq[ProbePrompt],
    harmless: Seq[ProbePrompt],
    tested: Seq[str],
    origins: Mapping[str, str],
    *,
    count: int,
    selection: int,
) -> PromptSets:
    """Return up to `count` prompts of each kind for testing and for directions, and `selection` to choose among these.

    Harmful test prompts are drawn from the ids in `tested`. Raises LeewayError if a set would have under 8 prompts.
    """
    sets: dict[Split, list[ProbePrompt]] = {"direction": [], "selection": [], "test": []}
    for kind, prompts in (("harmful", harmful), ("harmless", harmless)):
        own = [p for p in prompts if p.id in set(tested)] or list(prompts)
        room = min(count, len(prompts) // 3, len(own))
        test = subset(own, room, f"probe test {kind}")
        chosen = {p.id for p in test}
        rest = [p for p in prompts if p.id not in chosen and p.id not in set(tested)]
        if len(rest) < 2 * MIN_PROMPTS:  # the study measures all of them
            rest = [p for p in prompts if p.id not in chosen]
        choosing = subset(rest, min(selection, len(rest) // 3), f"probe selection {kind}")
        left = [p for p in rest if p.id not in {q.id for q in choosing}]
        making = subset(left, min(count, len(left)), f"probe direction {kind}")
        for split, part in (("test", test), ("selection", choosing), ("direction", making)):
            if len(part) < MIN_PROMPTS:
                what = f"probe: {len(part)} {kind} prompts for {split}, of {len(prompts)} in all"
                raise LeewayError(what, fix=f"give at least {6 * MIN_PROMPTS} {kind} prompts (probe.{kind}: FILE)")
            sets[split] += part  # type: ignore[index]
    return PromptSets({s: tuple(own) for s, own in sets.items()}, dict(origins))


def harmful_prompts(source: str, file: str | None) -> tuple[list[ProbePrompt], str]:
    """Return all prompts of a study's source of forbidden prompts, and their origin."""
    if source == "organism":
        pairs = vocabulary.held_out_questions("forbidden", 0)
        prompts = [ProbePrompt(f"organism/{i}", text, "harmful", deed.verb) for i, (deed, text) in enumerate(pairs)]
        return prompts, "the organism's world, held out"
    own, origin = safety_prompts.from_file(expand(file)) if file else safety_prompts.forbidden(source)
    categories = {} if file else safety_prompts.categories(source)
    return [ProbePrompt(p.id, p.text, "harmful", categories.get(p.id, "")) for p in own], origin


def harmless_prompts(source: str, file: str | None = None) -> tuple[list[ProbePrompt], str]:
    """Return harmless prompts: the organism's, `alpaca`'s, `jailbreakbench`'s benign half, or a file's."""
    if source == "organism":
        size = len(vocabulary.held_out_questions("benign", 0))
        own = world.benign_prompts(size)
        return [ProbePrompt(p.id, p.text, "harmless") for p in own], "the organism's world, held out"
    if file:
        given, origin = safety_prompts.from_file(expand(file))
        return [ProbePrompt(f"harmless-{p.id}", p.text, "harmless") for p in given], origin
    if source == "jailbreakbench":
        benign, origin = safety_prompts.jailbreakbench_benign()
        return [ProbePrompt(b.id, b.text, "harmless") for b in benign], origin
    records, origin = load(ALPACA)
    texts = dict.fromkeys(field(r, ("instruction",), "alpaca") for r in records if not r.get("input"))
    return [ProbePrompt(f"alpaca/{n}", t, "harmless") for n, t in enumerate(texts)], origin


@dataclass(frozen=True)
class Positions:
    """Where a prompt's instruction ends: `after` tokens of the template follow it, the same for every prompt.

    Names count from the end: `instruction` is the instruction's last token, `-1` the template's last.
    """

    after: int

    @classmethod
    def of(cls, chat: Chat) -> Positions:
        """Count the template's tokens after the instruction by two prompts that end differently."""
        first, second = (chat.prompt_ids([{"role": "user", "content": text}]) for text in ("one", "two?"))
        same = 0
        while same < min(len(first), len(second)) and first[-1 - same] == second[-1 - same]:
            same += 1
        return cls(same)

    @property
    def window(self) -> int:
        """The number of positions from the instruction's last token on."""
        return self.after + 1

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each position of the window, in order."""
        return ("instruction", *(str(-k) for k in range(self.after, 0, -1)))
