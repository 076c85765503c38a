"""One piece of a study: the base model, or one trajectory. All it leaves is on disk, so pieces may run anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from leeway.data.batches import Mark, Schedule
from leeway.errors import NotFiniteError
from leeway.evals.eval import Eval
from leeway.evals.likert import Likert
from leeway.evals.persona import Persona
from leeway.generation.backend import Backend
from leeway.generation.transformers import TransformersBackend
from leeway.model import adapters
from leeway.model.load import Model, load_model
from leeway.objectives.objective import PLAIN
from leeway.study import tuning
from leeway.study.computing import computing
from leeway.study.drawing import Drawing
from leeway.study.launch import Say, in_ranks
from leeway.study.objective_spec import ObjectiveSpec
from leeway.study.pieces import BASE, Piece, Who, schedule_of, whos
from leeway.study.prepare import HeldOut, Prepared, prepare
from leeway.study.serving import serving
from leeway.study.spec import Spec
from leeway.study.store import Store
from leeway.training import checkpoints
from leeway.training.checkpoints import Start
from leeway.training.loop import Optim, Step
from leeway.training.ranks import ALONE, Ranks
from leeway.training.trajectory import Settings, Trajectory, check_line

Kind = Literal["train", "generate", "choose"]
Tell = Callable[[Kind, float, str], None]
Read = Callable[[Path], dict[str, Any]]


@dataclass
class Work:
    """Carries pieces out; what is finished on disk is never done again."""

    prepared: Prepared
    store: Store
    tell: Tell
    ranks: Ranks = ALONE
    _base: Model | None = field(default=None, repr=False)

    def carry_out(self, piece: Piece) -> None:
        with computing(self.prepared.spec):
            {"base": self._measure_base, "tune": self._tune, "train": self._carry_trajectory}[piece.kind](piece)

    def base(self) -> Model:
        if self._base is None:
            self._base = self._load()
        return self._base

    def part(self, who: Who, e: Eval) -> Path:
        return self.store.part(who.objective, who.seed, who.budget, e.key, who.condition.name)

    def pending(self, who: Who) -> list[Eval]:
        return [e for e in self.prepared.evals if not self.store.answered(self.part(who, e))]

    def unfinished(self, piece: Piece) -> bool:
        if piece.kind == "tune":
            return not self.store.tuning(piece.alias).is_file()
        untrained = [b for b in piece.budgets if not checkpoints.finished(self._folder(piece, b))]
        return bool(untrained) or any(self.pending(who) for who in whos(self.prepared, piece))

    def ledger(self, piece: Piece, read: Read = checkpoints.read_ledger) -> list[dict[str, Any]]:
        """The ledger lines of a finished trajectory, held against what this study's data give."""
        lines = []
        for mark in schedule_of(self.prepared, piece).marks if piece.kind == "train" else ():
            folder = self._folder(piece, mark.budget)
            lines.append(read(folder))
            check_line(lines[-1], mark, folder)
        return lines

    def _folder(self, piece: Piece, budget: int) -> Path:
        return self.store.checkpoint(piece.alias, piece.seed, budget)

    def _measure_base(self, piece: Piece) -> None:
        control = {c: o.control_tokens for o in self.prepared.objectives.values() for c in o.conditions if c != PLAIN}
        asked = [who for who in whos(self.prepared, piece) if self.pending(who)]
        if self.prepared.spec.evals.backend == "vllm":
            self._base = None
            with serving(self.prepared.spec, asked) as server:
                for who in asked:
                    self._ask(server.base(who.condition.prefix), who, adapter_hash="none")
            return
        for who in asked:
            model = self.base()
            if control.get(who.condition):
                model = self._load()
                adapters.attach(model, self._settings(0.0, 0).adapter, seed=0, control_tokens=control[who.condition])
            self._measure(model, who, adapter_hash="none")

    def _carry_trajectory(self, piece: Piece) -> None:
        """Train to every budget that has no checkpoint yet, then measure what is not measured yet."""
        trajectory = self.train(piece)
        asked = [who for who in whos(self.prepared, piece) if self.pending(who)]
        if self.prepared.spec.evals.backend == "vllm":
            trajectory = None  # its memory is the server's
            with serving(self.prepared.spec, asked) as server:
                for who in asked:
                    folder = self._folder(piece, who.budget)
                    with server.adapter(folder, who.condition.prefix) as backend:
                        self._ask(backend, who, checkpoints.verified_ledger(folder)["adapter_hash"])
            return
        marks = {m.budget: m for m in schedule_of(self.prepared, piece).marks}
        for who in asked:
            trajectory = trajectory or self._trajectory(piece)
            line = trajectory.restore(self._folder(piece, who.budget), marks[who.budget], to_train=False)
            self._measure(trajectory.model, who, line["adapter_hash"])

    def train(self, piece: Piece) -> Trajectory | None:
        """Go on from the last checkpoint that can be resumed, and leave one at every budget that lacks it.

        Under `processes` this is one of the ranks, or who starts them and has nothing in memory afterwards.
        """
        marks = schedule_of(self.prepared, piece).marks
        folder = {m.budget: self._folder(piece, m.budget) for m in marks}
        missing = [k for k, m in enumerate(marks) if not checkpoints.finished(folder[m.budget])]
        if not missing:
            return None
        spec = self.prepared.spec
        if spec.processes > self.ranks.size:
            self._base = None  # its memory is the ranks'
            plain = spec.model_dump(mode="json", by_alias=True)
            in_ranks(spec.processes, spec.device, _train, (plain, self.store.folder, piece), lambda e: self.tell(*e))
            return None
        trajectory = self._trajectory(piece)
        start = max((k for k in range(missing[0]) if checkpoints.resumable(folder[marks[k].budget])), default=-1)
        if start >= 0:
            trajectory.restore(folder[marks[start].budget], marks[start], to_train=True)
        if self.ranks.leads:
            self.store.trim_steps(piece.log, trajectory.step)
        for k in range(start + 1, len(marks)):  # to the end, so that the log of its steps is whole
            trajectory.train_to(marks[k], self.store.steps(piece.log), self._step_teller(trajectory, marks[k]))
            if k in missing:
                trajectory.save(folder[marks[k].budget], marks[k])
            for earlier in range(k):
                checkpoints.forget_optimiser(folder[marks[earlier].budget])
        return trajectory

    def _tune(self, piece: Piece) -> None:
        """Train with every rate of the sweep, and keep the one that answers the held-out examples best."""
        tune, held_out = self.prepared.spec.optim.tune, self.prepared.tuning
        assert held_out is not None
        trials = tuple(self._trial(piece, lr, held_out) for lr in tune.lrs)
        choice = tuning.choose(piece.alias, trials, items=tune.items, budget=tune.budget)
        tuning.write(self.store.tuning(piece.alias), choice)

    def _trial(self, piece: Piece, lr: float, held_out: HeldOut) -> tuning.Trial:
        """One rate of the sweep; one that leaves the numbers has no accuracy, and its tokens count all the same."""
        schedule = held_out.schedules[piece.alias]
        trajectory = self._new_trajectory(piece, schedule, self._settings(lr, 0))
        log = self.store.steps(f"tune-{piece.alias}-{lr:g}")
        self.store.trim_steps(log.stem, 0)
        try:
            trajectory.train_to(schedule.marks[0], log, self._step_teller(trajectory, schedule.marks[0]))
        except NotFiniteError as error:
            return tuning.Trial(lr, None, trajectory.spent, 0, error.what)
        prefix, test = trajectory.objective.conditions[0].prefix, held_out.test
        backend = TransformersBackend(trajectory.model, prefix, self.prepared.spec.evals.batch)
        with adapters.merged(trajectory.model):
            rows = test.run(backend, self._answer_teller(f"{piece.alias}, rate {lr:g}", test))
        identity = {"objective": piece.alias, "seed": piece.seed, "budget": schedule.marks[0].budget}
        rows_path = self.store.tuning(piece.alias).with_name(f"{piece.alias}-{lr:g}.parquet")
        self.store.write_part(rows_path, {**identity, "adapter_hash": ""}, rows)
        asked = sum(len(backend.chat.prompt_ids([{"role": "user", "content": r.prompt}])) for r in rows)
        answered = asked + sum(r.new_tokens for r in rows)
        return tuning.Trial(lr, sum(r.score for r in rows) / len(rows), trajectory.spent, answered)

    def _measure(self, model: Model, who: Who, adapter_hash: str) -> None:
        """Every eval that this checkpoint still lacks, the adapter merged for as long as it takes."""
        batch = self.prepared.spec.evals.batch
        backend = TransformersBackend(model, who.condition.prefix, batch, overlong="failure")
        with adapters.merged(model):
            self._ask(backend, who, adapter_hash)

    def _ask(self, backend: Backend, who: Who, adapter_hash: str) -> None:
        identity = {
            "objective": who.objective,
            "seed": who.seed,
            "budget": who.budget,
            "adapter_hash": adapter_hash,
        }
        for e in self.pending(who):
            rows = e.run(backend, self._answer_teller(said(who), e))
            self.store.write_part(self.part(who, e), identity, rows)

    def _step_teller(self, trajectory: Trajectory, mark: Mark) -> Callable[[Step], None]:
        def tell(done: Step) -> None:
            self.tell(
                "train",
                done.processed_tokens + done.reference_tokens / 2,
                f"{trajectory.alias} s{trajectory.seed} step {done.step}/{mark.step} to {mark.budget:,} tokens "
                f"| loss {done.loss:.4f} | {done.processed_tokens / done.seconds:,.0f} tok/s",
            )

        return tell

    def _answer_teller(self, at: str, e: Eval) -> Callable[[int], None]:
        answered = 0

        def tell(n: int) -> None:
            nonlocal answered
            answered += n
            self.tell(kind_of(e), n, f"{at} | {e.key} {answered}/{len(e)}")

        return tell

    def _load(self) -> Model:
        spec = self.prepared.spec
        dtype, device = self.ranks.loading(spec.weights, spec.device)
        return load_model(spec.model, revision=spec.revision, dtype=dtype, device=device)

    def _trajectory(self, piece: Piece) -> Trajectory:
        lr, spent = self.prepared.spec.optim.lr_of(piece.alias), 0
        if lr is None:
            choice = tuning.read(self.store.tuning(piece.alias))
            lr, spent = choice.lr, choice.tokens
        return self._new_trajectory(piece, schedule_of(self.prepared, piece), self._settings(lr, spent))

    def _new_trajectory(self, piece: Piece, schedule: Schedule, settings: Settings) -> Trajectory:
        asked = self.prepared.spec.objective(piece.alias)
        return Trajectory(
            piece.alias,
            self.prepared.objectives[piece.alias],
            piece.seed,
            self._load(),
            schedule,
            settings,
            self.prepared.companions,
            self._start(asked, piece.seed),
            asked.reference,
            self.ranks,
        )

    def _start(self, asked: ObjectiveSpec, seed: int) -> Start | None:
        """What a trajectory starts from where that is not the base model, by the hash of what is there."""
        if asked.start is None:
            return None
        if asked.start.adapter is not None:
            return Start.of(Path(asked.start.adapter).expanduser())
        assert asked.start.from_ is not None
        assert asked.start.budget is not None
        folder = self.store.checkpoint(asked.start.from_, seed, asked.start.budget)
        return Start(folder, checkpoints.read_ledger(folder)["adapter_hash"])

    def _settings(self, lr: float, tuning_tokens: int) -> Settings:
        adapter, optim = self.prepared.spec.adapter, self.prepared.spec.optim
        return Settings(
            adapters.AdapterSettings(adapter.r, adapter.alpha, adapter.dropout, adapter.targets, adapter.kind),
            lr,
            optim.warmup_steps,
            optim.weight_decay,
            Optim(optim.clip, optim.micro_tokens, layout=optim.layout),
            optim.schedule,
            tuning_tokens,
            self.prepared.spec.reference,
        )


def _train(ranks: Ranks, say: Say, raw_spec: dict[str, Any], folder: Path, piece: Piece) -> None:
    """What each rank of a trajectory does."""
    spec, store = Spec.model_validate(raw_spec), Store(folder)
    prepared = prepare(spec, Drawing(store.pairs, kept=store.kept))
    with computing(spec):
        Work(prepared, store, lambda *event: say(event), ranks).train(piece)


def said(who: Who) -> str:
    """A checkpoint under its condition, as the progress names it."""
    at = BASE if who.objective == BASE else f"{who.objective} s{who.seed} at {who.budget:,} tokens"
    return at if who.condition == PLAIN else f"{at} under {who.condition.name}"


def kind_of(e: Eval) -> Kind:
    return "choose" if isinstance(e, (Persona, Likert)) else "generate"
