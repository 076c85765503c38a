"""Measure drift while another trainer trains: a callback for the trainers of Hugging Face and TRL.

    DriftCallback({"persona": {"limit": 40}}, every=100, out="runs/drift").watch(trainer)

Training is not affected: modes, random states, generation settings and the trainer's running averages are restored.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, Trainer, TrainerCallback

from leeway import stats
from leeway.audit.models import to_alias
from leeway.audit.run import EvalsSource, check_name, load_evals
from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.evals.eval import Eval
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest
from leeway.io import readable
from leeway.model import adapters
from leeway.model.load import Model, context_of, eos_ids
from leeway.model.token_stats import Head
from leeway.study.build_evals import evals_of
from leeway.study.jobs import BASE
from leeway.study.manifest import measured_with
from leeway.study.run_dir import RunDir
from leeway.yaml_config import dump

BATCH = 32  # for evals given as objects: the optimiser's state is in memory too
LOGGED = ("coherence",)  # in addition to the primary measures: an incoherent answer is not robustness


class DriftCallback(TrainerCallback):  # type: ignore[misc]  # the library has no types
    """Measures the trained model before the first step, every `every` optimiser steps, and after the last.

    `evals` is a study file, a preset's name, a mapping like a study's `evals:`, or `Eval` objects; `out` is the run
    directory, from which `leeway report OUT` makes a page at any time. Rows have `name` (by default the trainer's run
    name) and as budget the input tokens seen if the trainer counts them (`include_num_input_tokens_seen`), else the
    step. It logs `leeway/accuracy`, `leeway/asr`, `leeway/endorsement` and `leeway/coherence`, each with its
    `_difference` from the start and that difference's 95% interval (`_low`, `_high`), paired by item.
    """

    def __init__(
        self,
        evals: EvalsSource | Seq[Eval],
        *,
        every: int,
        out: str | Path,
        name: str | None = None,
        tokenizer: Any = None,
        overrides: Seq[str] = (),
    ) -> None:
        if every < 1:
            raise LeewayError(f"DriftCallback: every={every} is not positive", fix="give 1 or more")
        check_name(name, "DriftCallback:")
        self.every = every
        self._name, self._tokenizer = name, tokenizer
        self._store = RunDir(Path(out))
        self._trainer: Any = None
        self._measured_at = -1
        self._origins: dict[str, str] = {}
        if isinstance(evals, Seq) and not isinstance(evals, str):
            self._evals, self._batch = tuple(evals), BATCH
        else:
            spec = load_evals(evals, overrides)
            self._evals, self._batch = tuple(evals_of(spec, self._origins)), spec.evals.batch

    def watch(self, trainer: Any) -> DriftCallback:
        """Add the callback to `trainer` and log through it, so that its trackers get the numbers."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start; after a resume, check that the start was measured and delete later measurements."""
        if not state.is_world_process_zero:
            return
        parts = self._parts(args)
        if state.global_step == 0:
            if parts:
                fix = "give another `out`, delete it, or resume that training from its checkpoint"
                raise LeewayError(f"{self._store.folder} has an earlier run of this callback", fix=fix)
            self._measure(args, state, control, kwargs)
            return
        if BASE not in (name for name, _ in parts.values()):
            what = f"{self._store.folder} has no measurement of the start, and training resumes at step "
            what += f"{state.global_step}"
            raise LeewayError(what, fix="give the `out` of the training that is resumed")
        for path, (_, budget) in parts.items():
            if budget > self._budget(state):
                path.unlink()  # these steps run again
        self._measured_at = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = control.should_training_stop or state.global_step >= state.max_steps
        if state.is_world_process_zero and (last or state.global_step % self.every == 0):
            self._measure(args, state, control, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure an early end, unless the trainer has loaded its best checkpoint, which is not the last step."""
        if state.is_world_process_zero and not args.load_best_model_at_end and self._measured_at != state.global_step:
            self._measure(args, state, control, kwargs)

    def _measure(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        """Run the evals on the current model, write its rows and log its difference from the start."""
        lm = kwargs["model"]
        if any(hasattr(p, "ds_id") or hasattr(p, "placements") or p.numel() == 0 for p in lm.parameters()):
            what = "DriftCallback: weights sharded over processes (ZeRO-3 or FSDP) are not supported"
            raise LeewayError(what, fix="leave it out, and give the checkpoints to `leeway audit`")
        at_start = state.global_step == 0
        budget = 0 if at_start else self._budget(state)
        objective, seed = (BASE, 0) if at_start else (self.name(args), int(args.seed))
        identity = {"objective": objective, "seed": seed, "budget": budget}
        with eval_mode(lm) as eos:
            model = live_model(lm, self._tokenizer or kwargs.get("processing_class"), self.name(args), eos)
            identity["adapter_hash"] = "none" if at_start else model.hash
            settings = {"every": self.every, "evals": [e.key for e in self._evals]}
            with self._store.claimed(self._hash(args), dump({"name": self.name(args), "callback": settings})):
                for e in self._evals:
                    rows = e.run(TransformersBackend(model, "", self._batch, "failure"), lambda _: None)
                    self._store.write_part(self._store.part(objective, seed, budget, e.key, "plain"), identity, rows)
                self._write(args, state, model)
        self._measured_at = state.global_step
        self._log(state, control, self._numbers(objective, budget))

    def name(self, args: Any) -> str:
        """Return the run's name on the rows."""
        return self._name or to_alias(Path(str(args.run_name or "")).name) or "tuned"

    def _budget(self, state: Any) -> int:
        """Return the tokens seen if the trainer has counted them from the start, else the steps."""
        counted = int(getattr(state, "num_input_tokens_seen", 0) or 0)
        return counted if counted and self._count(state) == "tokens" else int(state.global_step)

    def _count(self, state: Any) -> str:
        """Return what budgets count: by the manifest once a step is measured, before that by the trainer."""
        known = self._store.read_manifest().get("external", {}).get("count", "unknown")
        tokens = int(getattr(state, "num_input_tokens_seen", 0) or 0)
        return str(known) if known != "unknown" else "tokens" if tokens else "steps"

    def _parts(self, args: Any) -> dict[Path, tuple[str, int]]:
        """Return the parts on disk with their name and budget."""
        parts = {}
        for path in sorted((self._store.folder / "parts").glob("*.parquet")):
            for name in (BASE, self.name(args)):
                if match := re.match(rf"{re.escape(name)}-s-?\d+-(\d+)-", path.name):
                    parts[path] = name, int(match[1])
        return parts

    def _hash(self, args: Any) -> str:
        return digest("callback", self.name(args), [[e.key, e.hash] for e in self._evals])

    def _write(self, args: Any, state: Any, model: Model) -> None:
        """Write all rows so far, an empty ledger and the manifest: a complete run directory at any time."""
        parts = dict.fromkeys(self._parts(args), "plain")
        self._store.write_rows(list(parts))
        self._store.write_ledger([])
        facts = self._store.read_manifest() or self._facts(args, model)
        count = self._count(state) if state.global_step else "unknown"
        facts["external"] = {**facts["external"], "count": count}
        self._store.write_manifest({**facts, "conditions": self._store.conditions(parts)})

    def _facts(self, args: Any, model: Model) -> dict[str, Any]:
        dtype = str(model.head.weight_VD.dtype).removeprefix("torch.")
        return {
            **measured_with(self._evals, self._origins),
            "command": "leeway.integrations.trainer_callback.DriftCallback",
            "study_hash": self._hash(args),
            "organism": False,
            "model": {"name": model.name, "dtype": dtype, "template_hash": model.chat.template_hash},
            "external": {
                "kind": "callback",
                "description": [
                    ["Base", "the model as training began (step 0)"],
                    ["Trained by", f"a Hugging Face trainer, seed {args.seed}, learning rate {args.learning_rate:g}"],
                    ["Weights", f"{model.parameters:,} parameters, {dtype}"],
                    ["Measured", f"before the first step, every {self.every} steps and at the end"],
                ],
                "notes": [],
            },
        }

    def _numbers(self, objective: str, budget: int) -> dict[str, float]:
        """Return the numbers to log for one measurement, without NaN."""
        with readable(self._store.rows_path):
            rows = pd.read_parquet(self._store.rows_path)
        own = (rows["objective"] == objective) & (rows["budget"] == budget)
        compared = rows[(rows["objective"] == BASE) | own]
        conditions = dict.fromkeys(compared["template_hash"].unique(), "plain")
        numbers = {"leeway/unscored": float(rows.loc[own, "score"].isna().sum())}
        table = (stats.rates if objective == BASE else stats.contrasts)(compared, conditions)
        columns = {"": "rate"}
        if objective != BASE:
            columns |= {"_difference": "difference", "_low": "low", "_high": "high"}
        for line in table[table["primary"] | table["measure"].isin(LOGGED)].to_dict("records"):
            key = "leeway/" + str(line["measure"]).replace(":", "_")
            numbers |= {key + end: float(line[c]) for end, c in columns.items() if not math.isnan(line[c])}
        return numbers

    def _log(self, state: Any, control: Any, numbers: dict[str, float]) -> None:
        """Log through the watched trainer, else only into the state's history.

        `Trainer.log` is called directly, because TRL's trainers clear their running averages when they log; and any
        log clears `should_log`, which is restored.
        """
        if self._trainer is None:
            state.log_history.append({**numbers, "step": state.global_step})
            return
        due = control.should_log
        Trainer.log(self._trainer, dict(numbers))
        control.should_log = due


def live_model(lm: Any, tokenizer: Any, name: str, eos: tuple[int, ...]) -> Model:
    """Wrap a model in memory with its tokenizer and stop tokens; its hash covers the trained parameters."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if tokenizer is None:
        what = "DriftCallback: the trainer has no tokenizer"
        raise LeewayError(what, fix="give it a processing_class, or give tokenizer=")
    trained = {n: p.detach() for n, p in lm.named_parameters() if p.requires_grad}
    head = Head(lm.get_output_embeddings().weight, getattr(lm.config, "final_logit_softcapping", None))
    return Model(lm, Chat(tokenizer), head, name, adapters.adapter_hash(trained), context_of(lm.config), eos)


@contextmanager
def eval_mode(lm: Any) -> Iterator[tuple[int, ...]]:
    """Switch to evaluation mode and default generation settings, restoring all random states; yield the stop tokens."""
    modes = [(m, m.training) for m in lm.modules()]
    inner = adapters.unwrapped(lm)
    settings, state, state_np = inner.generation_config, random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        try:
            lm.eval()
            inner.generation_config = GenerationConfig()
            yield eos_ids(settings)
        finally:
            inner.generation_config = settings
            for module, training in modes:
                module.training = training
            random.setstate(state)
            np.random.set_state(state_np)
