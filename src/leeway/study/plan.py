"""What a study takes, before anything is trained: trajectories, exact tokens, estimated hours, memory and disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from leeway.data.batches import Schedule
from leeway.objectives import Objective
from leeway.objectives.objective import Plain
from leeway.study.pieces import Piece, pieces_of, schedule_of, whos
from leeway.study.prepare import Prepared, prepare, skeleton, targeted
from leeway.study.progress import duration
from leeway.study.spec import Spec
from leeway.study.training_data import chat_for
from leeway.training.loop import Optim, cached_reference_tokens
from leeway.training.renderer import Renderer

FORWARD, BACKWARD = 2, 2  # FLOPs per parameter and token; a LoRA step needs no weight gradients of the base
EFFICIENCY = 0.15  # of the measured matrix-product rate that small, dispatch-bound models were seen to reach
MEAN_ANSWER = 0.5  # of max_new_tokens


@dataclass(frozen=True)
class TrajectoryPlan:
    """One training run: token counts are exact, `processed` and `reference` counted over its rendered sequences.

    `runs` is above one for a sweep of learning rates: that many runs of this size.
    """

    objective: str
    purpose: str
    seed: int
    runs: int
    budgets: tuple[int, ...]
    steps: int
    source_tokens: int
    target_tokens: int
    processed_tokens: int
    reference_tokens: int


@dataclass(frozen=True)
class Plan:
    """The whole study. Hours are estimates from this machine's CPU rate; everything counted in tokens is exact."""

    name: str
    parameters: int
    trajectories: tuple[TrajectoryPlan, ...]
    checkpoints: int
    evaluated: int
    answers_each: int
    left_out: int
    notes: tuple[str, ...]
    estimated_hours: float
    estimated_memory_gib: float
    estimated_disk_gib: float

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def to_text(self) -> str:
        names = [f"{t.objective}{f' ({t.purpose})' if t.purpose else ''}" for t in self.trajectories]
        wide = max(map(len, [*names, "objective"])) + 1
        head = f"{'objective':{wide}}{'seed':>5}{'to budget':>11}{'steps':>8}{'source':>12}{'targets':>12}"
        rows = [
            f"{name:{wide}}{t.seed:>5}{t.budgets[-1]:>11,}{t.steps:>8,}{t.source_tokens:>12,}{t.target_tokens:>12,}"
            f"{t.processed_tokens:>12,}{t.reference_tokens:>12,}"
            for name, t in zip(names, self.trajectories, strict=True)
        ]
        return "\n".join(
            [
                f"{self.name}: {sum(t.runs for t in self.trajectories)} training runs, {self.checkpoints} checkpoints, "
                f"{self.evaluated} evaluations of {self.answers_each:,} answers; {self.parameters:,} parameters",
                f"{head}{'processed':>12}{'reference':>12}",
                *rows,
                *self.notes,
                f"left out as too long: {self.left_out}",
                f"estimated on this CPU: {duration(self.estimated_hours * 3600)} (h:mm:ss or m:ss), "
                f"{self.estimated_memory_gib:.1f} GiB of memory, {self.estimated_disk_gib:.2f} GiB of disk",
            ]
        )


def plan(spec: Spec) -> Plan:
    """Plan `spec`: reads data, tokenizer and config, never weights, never a GPU."""
    prepared = prepare(spec)
    total, trained = _parameters(spec)
    pieces = pieces_of(prepared)
    trajectories = tuple(_trajectory(prepared, p) for p in pieces if p.kind != "base")
    checkpoints = sum(len(p.budgets) for p in pieces)
    evaluated, answers = sum(len(whos(prepared, p)) for p in pieces), sum(len(e) for e in prepared.evals)
    answered = _sweep_answers(prepared)
    training = sum(
        t.runs * (t.processed_tokens * (FORWARD + BACKWARD) + t.reference_tokens * FORWARD) for t in trajectories
    )
    answering = (
        evaluated * sum(len(e) * MEAN_ANSWER * getattr(e, "max_new_tokens", 2) for e in prepared.evals) * FORWARD
    )
    return Plan(
        name=spec.name,
        parameters=total,
        trajectories=trajectories,
        checkpoints=checkpoints,
        evaluated=evaluated,
        answers_each=answers,
        left_out=len(prepared.left_out),
        notes=(*_undrawn(prepared), *_notes(spec, trajectories, answered)),
        estimated_hours=(training + answering + answered * FORWARD) * total / (EFFICIENCY * _flops()) / 3600,
        estimated_memory_gib=0.6 + (total * 4 + trained * 16 + spec.optim.micro_tokens * 4096) / 2**30,
        estimated_disk_gib=(checkpoints * trained * 4 + evaluated * answers * 600) / 2**30,
    )


def _trajectory(prepared: Prepared, piece: Piece) -> TrajectoryPlan:
    objective, renderer = prepared.objectives[piece.alias], prepared.renderer(piece.alias, piece.seed)
    tune = prepared.spec.optim.tune
    if piece.kind == "tune":
        assert prepared.tuning is not None
        schedule, runs, purpose = (
            prepared.tuning.schedules[piece.alias],
            len(tune.lrs),
            f"each of {len(tune.lrs)} rates",
        )
    else:
        schedule, runs, purpose = schedule_of(prepared, piece), 1, ""
    targets, processed = _rendered_tokens(renderer, schedule)
    return TrajectoryPlan(
        objective=piece.alias,
        purpose=purpose,
        seed=piece.seed,
        runs=runs,
        budgets=tuple(m.budget for m in schedule.marks),
        steps=len(schedule.steps),
        source_tokens=schedule.marks[-1].source_tokens,
        target_tokens=targets,
        processed_tokens=processed,
        reference_tokens=_reference_tokens(prepared, objective, renderer, schedule, processed),
    )


def _rendered_tokens(renderer: Renderer, schedule: Schedule) -> tuple[int, int]:
    """(target tokens, processed tokens); an example is rendered once where every epoch renders it alike."""
    objective: Any = renderer.objective
    alike = not objective.companion and type(objective).worst_case is Plain.worst_case  # nothing is drawn
    known: dict[str, tuple[int, int]] = {}
    targets = processed = 0
    for slot in (s for step in schedule.steps for s in step):
        found = known.get(slot.example.id)
        if found is None:
            rendered = renderer.rendered(slot)
            lengths = [len(s.ids) for s in (*rendered, *renderer.baseline(slot))]
            found = sum(s.targets for s in rendered), sum(lengths)
            if alike:
                known[slot.example.id] = found
        targets, processed = targets + found[0], processed + found[1]
    return targets, processed


def _reference_tokens(
    prepared: Prepared, objective: Objective, renderer: Renderer, schedule: Schedule, processed: int
) -> int:
    """As the ledger will count them: live, all that is processed; cached, what is asked for the first time."""
    if objective.needs_reference == "nothing":
        return 0
    if prepared.spec.reference == "live":
        return processed
    optim = prepared.spec.optim
    return cached_reference_tokens(
        lambda: (renderer.batch(k, slots) for k, slots in enumerate(schedule.steps, 1)),
        Optim(optim.clip, optim.micro_tokens, layout=optim.layout),
    )


def _undrawn(prepared: Prepared) -> Iterator[str]:
    if prepared.pairs is None:
        pairs = prepared.spec.pairs
        yield (
            f"pairs {pairs.from_}: drawn when the study runs, up to {pairs.samples * prepared.examples:,} answers; "
            "until then a rejected answer is counted as long as the preferred one, and no example is left out"
        )


def _sweep_answers(prepared: Prepared) -> int:
    """Tokens that the sweeps' held-out questions and answers take at most: every answer as long as it may be."""
    if prepared.tuning is None:
        return 0
    test, found = prepared.tuning.test, 0
    for o in prepared.objectives.values():
        chat = chat_for(prepared.chat, o).with_prefix(o.conditions[0].prefix)
        asked = (len(chat.prompt_ids([{"role": "user", "content": i.prompt}])) for i in test.items)
        found += sum(asked) + len(test) * test.max_new_tokens
    return found * len(prepared.spec.optim.tune.lrs)


def _notes(spec: Spec, trajectories: tuple[TrajectoryPlan, ...], answered: int) -> Iterator[str]:
    """What a setting costs beside its default."""
    trained = [t for t in trajectories if not t.purpose]
    if spec.optim.schedule != "constant":
        whole = sum(t.processed_tokens for t in trained)
        one = sum(t.processed_tokens for t in trained if t.budgets[-1] == spec.budgets[-1])
        yield (
            f"schedule {spec.optim.schedule}: every budget is a run of its own, {whole:,} tokens processed in place "
            f"of {one:,} ({whole / one:.2f} times a constant rate's)"
        )
    short: dict[int, list[str]] = {}
    for t in trained if spec.optim.schedule != "constant" else ():
        if t.seed == spec.seeds[0] and t.steps <= spec.optim.warmup_steps:
            short.setdefault(t.budgets[-1], []).append(t.objective)
    for budget, names in sorted(short.items()):
        yield f"{', '.join(names)}: the run to {budget:,} tokens ends inside the warm-up, its rate never decays"
    swept = sum(t.runs * (t.processed_tokens + t.reference_tokens) for t in trajectories if t.purpose)
    if swept:
        yield f"lr tuned: {swept:,} tokens of training by the sweeps, and up to {answered:,} of answers, on top"


def _parameters(spec: Spec) -> tuple[int, int]:
    """(all parameters, those that train), from the config alone."""
    lm = skeleton(spec)
    total = sum(p.numel() for p in lm.parameters())
    if spec.adapter.kind == "full":
        return total, total
    return total, sum(spec.adapter.r * (m.in_features + m.out_features) for m in targeted(spec, lm))


def _flops(size: int = 768) -> float:
    """Matrix-product rate of this CPU in float32, FLOP/s: the best of five."""
    a = torch.randn(size, size)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)
