"""Drift beside somebody else's training: a callback for Hugging Face's Trainer and TRL's.

    DriftCallback({"persona": {"limit": 40}}, every=100, out="runs/drift").watch(trainer)

At the start, at every n-th step and at the end the model that is being trained answers the same items, as it stands and
in evaluation mode. Training goes on as if nobody had asked: modes, random states, generation settings and the
trainer's running averages are put back, and its own log keeps its lines.
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
from leeway.audit.models import as_alias
from leeway.audit.run import EvalsAsked, measured_by
from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.evals.eval import Eval
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import digest
from leeway.io import readable
from leeway.model import adapters
from leeway.model.load import Model
from leeway.model.token_stats import Head
from leeway.study.build_evals import evals_of
from leeway.study.jobs import BASE
from leeway.study.manifest import measured_with
from leeway.study.run_dir import RunDir
from leeway.study.spec import ALIAS
from leeway.yaml_config import dump

BATCH = 32  # answers at a time, where evals come as objects: the optimiser's state is in memory too
LOGGED = ("coherence",)  # beside the primary measures: an answer that means nothing is not robustness


class DriftCallback(TrainerCallback):  # type: ignore[misc]  # the library has no types
    """Measures the model in training every `every` optimiser steps, and before the first and after the last one.

    `evals` is a study file, a preset's name, what stands under a study's `evals:`, or `Eval` objects; `out` the run
    directory, from which `leeway report OUT` makes a page at any time. Rows carry `name` (else the trainer's run name)
    and as their budget the input tokens seen where the trainer counts them (`include_num_input_tokens_seen`), else the
    step. Logged are `leeway/accuracy`, `leeway/asr`, `leeway/endorsement` and `leeway/coherence`, each with its
    `_difference` from the start and that one's 95% interval (`_low`, `_high`), paired by item.
    """

    def __init__(
        self,
        evals: EvalsAsked | Seq[Eval],
        *,
        every: int,
        out: str | Path,
        name: str | None = None,
        tokenizer: Any = None,
        overrides: Seq[str] = (),
    ) -> None:
        if every < 1:
            raise LeewayError(f"DriftCallback: every={every} is no number of steps", fix="give 1 or more")
        if name is not None and (not ALIAS.fullmatch(name) or name == BASE):
            raise LeewayError(
                f"DriftCallback: {name!r} cannot be a name on the rows",
                fix="use lower-case letters, digits, . _ - and not 'base'",
            )
        self.every = every
        self._name, self._tokenizer = name, tokenizer
        self._store = RunDir(Path(out))
        self._trainer: Any = None
        self._measured_at = -1
        self._origins: dict[str, str] = {}
        if isinstance(evals, Seq) and not isinstance(evals, str):
            self._evals, self._batch = tuple(evals), BATCH
        else:
            spec = measured_by(evals, overrides)
            self._evals, self._batch = tuple(evals_of(spec, self._origins)), spec.evals.batch

    def watch(self, trainer: Any) -> DriftCallback:
        """Add this to `trainer`, and log through it, so that its trackers see the numbers."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start; or, where training was resumed, check that it is measured and forget what came after."""
        if not state.is_world_process_zero:
            return
        found = self._parts(args)
        if state.global_step == 0:
            if found:
                raise LeewayError(
                    f"{self._store.folder} holds an earlier run of this callback",
                    fix="give another out, delete it, or resume that training from its checkpoint",
                )
            self._measure(args, state, control, kwargs)
            return
        if BASE not in (who for who, _ in found.values()):
            raise LeewayError(
                f"{self._store.folder} has no measurement of the start, and training resumes at step "
                f"{state.global_step}",
                fix="give the out that the resumed training had",
            )
        for path, (_, budget) in found.items():
            if budget > self._budget(state):
                path.unlink()  # of steps that are taken again
        self._measured_at = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = control.should_training_stop or state.global_step >= state.max_steps
        if state.is_world_process_zero and (last or state.global_step % self.every == 0):
            self._measure(args, state, control, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure an end that came unannounced; a best checkpoint that was loaded there is not the last step's."""
        if state.is_world_process_zero and not args.load_best_model_at_end and self._measured_at != state.global_step:
            self._measure(args, state, control, kwargs)

    def _measure(self, args: Any, state: Any, control: Any, given: dict[str, Any]) -> None:
        """Ask the model as it stands, write its rows and log how far it is from the start."""
        lm = given["model"]
        if _sharded(lm):
            raise LeewayError(
                "DriftCallback: the weights are sharded over processes (ZeRO-3 or FSDP), and one cannot ask them alone",
                fix="leave it out, and give the checkpoints to `leeway audit`",
            )
        at_start = state.global_step == 0
        budget = 0 if at_start else self._budget(state)
        objective, seed = (BASE, 0) if at_start else (self.name(args), int(args.seed))
        identity = {"objective": objective, "seed": seed, "budget": budget}
        with undisturbed(lm) as eos:
            model = live_model(lm, self._tokenizer or given.get("processing_class"), self.name(args), eos)
            identity["adapter_hash"] = "none" if at_start else model.hash
            with self._store.claimed(self._hash(args), self._as_yaml(args)):
                for e in self._evals:
                    rows = e.run(TransformersBackend(model, "", self._batch, "failure"), lambda _: None)
                    self._store.write_part(self._store.part(objective, seed, budget, e.key, "plain"), identity, rows)
                self._write(args, state, model)
        self._measured_at = state.global_step
        self._log(state, control, self._numbers(objective, budget))

    def name(self, args: Any) -> str:
        """What this run is called on the rows."""
        return self._name or as_alias(Path(str(args.run_name or "")).name) or "tuned"

    def _budget(self, state: Any) -> int:
        """Tokens where the trainer counts them and did so from the start, else steps."""
        counted = int(getattr(state, "num_input_tokens_seen", 0) or 0)
        return counted if counted and self._count(state) == "tokens" else int(state.global_step)

    def _count(self, state: Any) -> str:
        """What budgets count: as the manifest says once a step was measured, until then as the trainer does."""
        known = self._store.read_manifest().get("external", {}).get("count", "unknown")
        tokens = int(getattr(state, "num_input_tokens_seen", 0) or 0)
        return str(known) if known != "unknown" else "tokens" if tokens else "steps"

    def _parts(self, args: Any) -> dict[Path, tuple[str, int]]:
        """What was measured so far, with its name and budget."""
        found = {}
        for path in sorted((self._store.folder / "parts").glob("*.parquet")):
            for who in (BASE, self.name(args)):
                if at := re.match(rf"{re.escape(who)}-s-?\d+-(\d+)-", path.name):
                    found[path] = who, int(at[1])
        return found

    def _hash(self, args: Any) -> str:
        return digest("callback", self.name(args), [[e.key, e.hash] for e in self._evals])

    def _as_yaml(self, args: Any) -> str:
        plain = {"name": self.name(args), "callback": {"every": self.every, "evals": [e.key for e in self._evals]}}
        return dump(plain)

    def _write(self, args: Any, state: Any, model: Model) -> None:
        """Rows of all that was measured so far, an empty ledger and the manifest: a run directory at any time."""
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
                    ["Measured", f"before the first step, every {self.every} steps and at the end, beside training"],
                ],
                "notes": [],
            },
        }

    def _numbers(self, objective: str, budget: int) -> dict[str, float]:
        """What is logged of one measurement; a number that may not be printed is left out."""
        with readable(self._store.rows_path):
            rows = pd.read_parquet(self._store.rows_path)
        mine = rows[(rows["objective"] == BASE) | ((rows["objective"] == objective) & (rows["budget"] == budget))]
        conditions = dict.fromkeys(mine["template_hash"].unique(), "plain")
        found: dict[str, float] = {"leeway/unscored": float(rows_of(mine, objective, budget)["score"].isna().sum())}
        if objective == BASE:
            table = stats.rates(mine, conditions)
            wanted = {"": "rate"}
        else:
            table = stats.contrasts(mine, conditions)
            wanted = {"": "rate", "_difference": "difference", "_low": "low", "_high": "high"}
        for line in table[table["primary"] | table["measure"].isin(LOGGED)].to_dict("records"):
            key = "leeway/" + str(line["measure"]).replace(":", "_")
            found |= {key + end: float(line[c]) for end, c in wanted.items() if not math.isnan(line[c])}
        return found

    def _log(self, state: Any, control: Any, numbers: dict[str, float]) -> None:
        """Through the trainer's own log where it is known, else into the state's history alone.

        TRL's trainers empty their running averages whenever they log, and every log takes back that one is due: ours
        does neither.
        """
        if self._trainer is None:
            state.log_history.append({**numbers, "step": state.global_step})
            return
        due = control.should_log
        Trainer.log(self._trainer, dict(numbers))
        control.should_log = due


def rows_of(rows: pd.DataFrame, objective: str, budget: int) -> pd.DataFrame:
    return rows[(rows["objective"] == objective) & (rows["budget"] == budget)]


def live_model(lm: Any, tokenizer: Any, name: str, eos: tuple[int, ...]) -> Model:
    """A model that is already in memory, with its tokenizer and stop tokens; its hash is over what trains."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
    if tokenizer is None:
        raise LeewayError(
            "DriftCallback: the trainer has no tokenizer", fix="give it a processing_class, or give tokenizer="
        )
    config = lm.config.get_text_config() if hasattr(lm.config, "get_text_config") else lm.config
    context = int(getattr(config, "max_position_embeddings", 0) or 2**31)
    trained = {n: p.detach() for n, p in lm.named_parameters() if p.requires_grad}
    head = Head(lm.get_output_embeddings().weight, getattr(config, "final_logit_softcapping", None))
    return Model(lm, Chat(tokenizer), head, name, adapters.adapter_hash(trained), context, eos)


@contextmanager
def undisturbed(lm: Any) -> Iterator[tuple[int, ...]]:
    """Evaluation mode without generation settings but their stop tokens, which are what it yields.

    Every mode, setting and random state comes back as it was.
    """
    modes = [(m, m.training) for m in lm.modules()]
    inner = _innermost(lm)
    settings, drawn, drawn_np = inner.generation_config, random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        try:
            lm.eval()
            inner.generation_config = GenerationConfig()
            eos = settings.eos_token_id
            yield tuple(eos if isinstance(eos, list) else [eos] if eos is not None else [])
        finally:
            inner.generation_config = settings
            for module, training in modes:
                module.training = training
            random.setstate(drawn)
            np.random.set_state(drawn_np)


def _innermost(lm: Any) -> Any:
    """The model under an adapter."""
    return lm.get_base_model() if hasattr(lm, "peft_config") and hasattr(lm, "get_base_model") else lm


def _sharded(lm: Any) -> bool:
    return any(hasattr(p, "ds_id") or hasattr(p, "placements") or p.numel() == 0 for p in lm.parameters())
