"""Probe the checkpoints of a study or audit: the jobs, their files in the run directory, and the tables made of them.

The base's directions and persona vectors come first; each checkpoint is then a job of its own, and each of its measures
a file under a hash of everything it depends on: a killed probe resumes, a repeated one does nothing, another one adds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from leeway.data import persona
from leeway.data.safety_prompts import subset
from leeway.data.types import PersonaItem
from leeway.errors import LeewayError
from leeway.evals.jailbreak import Jailbreak
from leeway.hashing import digest, file_digest
from leeway.io import atomic_write, expand, readable, write_json
from leeway.model.load import Model, weights_hash
from leeway.organism import world
from leeway.probe import adapter_layers, geometry, mediation, patching, persona_shift, token_depth, weights
from leeway.probe.context import HarmfulAnswer, ProbeContext, Value, states
from leeway.probe.directions import Directions, compute
from leeway.probe.pair import ModelPair
from leeway.probe.prompts import Positions, PromptSets, harmful_prompts, harmless_prompts, split_prompts
from leeway.probe.refusal_logit import OpeningTree, openings
from leeway.probe.spec import MEASURES, Measure, ProbeSpec
from leeway.stats import mechanism
from leeway.study.build_evals import forbidden_prompts
from leeway.study.jobs import BASE, Job
from leeway.study.prepare import Prepared, train_examples
from leeway.study.run_dir import RunDir

DATA = "data"  # the objective column of what is measured on the training data, before training
VERSION = 4  # of what a part holds
RUN: dict[Measure, Callable[[ProbeContext], list[Value]]] = {
    "geometry": geometry.measure,
    "patching": patching.measure,
    "layers": adapter_layers.measure,
    "mediation": mediation.measure,
    "persona": persona_shift.measure,
    "depth": token_depth.measure,
    "weights": weights.measure,
}
LONG: tuple[Measure, ...] = ("layers", "patching", "mediation")
NEEDS_JAILBREAK = "give probe: {harmful: FILE}, or measure a study with a jailbreak eval"


def probe_jobs(prepared: Prepared, *, chosen: bool = True) -> list[Job]:
    """Return the base's job and one for every checkpoint to probe, or for every one of the study."""
    spec = prepared.spec.probe
    if spec is None:
        return []
    base = Job("probe", BASE)
    if prepared.external:
        audited = [(alias, m) for alias, m in prepared.external.items() if alias != BASE]
        return [base, *(Job("probe", alias, 0, (m.budget,), (base,)) for alias, m in audited)]
    study = prepared.spec
    aliases = [o.alias for o in study.objectives if not (chosen and spec.objectives) or o.alias in spec.objectives]
    budgets = [b for b in study.budgets if not (chosen and spec.budgets) or b in spec.budgets]
    places = [(alias, seed, b) for alias in aliases for seed in study.seeds for b in budgets]
    return [base, *(Job("probe", a, s, (b,), (base,), needs=((a, s, b),)) for a, s, b in places)]


def split_jobs(jobs: Sequence[Job], measures: Sequence[Measure]) -> list[Job]:
    """Return each checkpoint's job as several, one for each measure that takes long: several workers can share it."""
    quick = tuple(m for m in measures if m not in LONG)
    groups = [*((m,) for m in LONG if m in measures), *([quick] if quick else [])]
    base, checkpoints = ([job for job in jobs if (job.alias == BASE) == is_base] for is_base in (True, False))
    return [*base, *(replace(job, measures=group) for job in checkpoints for group in groups)]


@dataclass
class Probing:
    """The probe of one run directory."""

    prepared: Prepared
    store: RunDir

    @property
    def spec(self) -> ProbeSpec:
        assert self.prepared.spec.probe is not None
        return self.prepared.spec.probe

    @property
    def folder(self) -> Path:
        return self.store.folder / "probe"

    @cached_property
    def prompts(self) -> PromptSets:
        """The prompts of the probe; raises LeewayError if a set is too small."""
        own, jailbreak = self.spec, self.prepared.spec.evals.jailbreak
        tested: list[str] = []
        if own.harmful:
            harmful, origin = harmful_prompts("file", own.harmful)
        elif jailbreak is None:
            raise LeewayError("probe: the study has no forbidden prompts", fix=NEEDS_JAILBREAK)
        else:
            harmful, origin = harmful_prompts(jailbreak.prompts, jailbreak.file)
            tested = [p.id for p in forbidden_prompts(jailbreak)[0]]
        named = own.harmless
        if named == "auto":
            named = "organism" if self.is_organism else "alpaca"
        known = named in ("organism", "alpaca", "jailbreakbench")
        harmless, from_ = harmless_prompts(named if known else "file", None if known else named)
        origins = {"harmful": origin, "harmless": from_}
        return split_prompts(harmful, harmless, tested, origins, count=own.prompts, selection=own.selection)

    @property
    def is_organism(self) -> bool:
        jailbreak = self.prepared.spec.evals.jailbreak
        return jailbreak is not None and jailbreak.prompts == "organism"

    @cached_property
    def tree(self) -> OpeningTree:
        return OpeningTree.of(self.prepared.chat)

    @cached_property
    def base_hash(self) -> str:
        """The hash of what the directions depend on."""
        study = self.prepared.spec
        external = self.prepared.external.get(BASE)
        model = external.base_hash if external else weights_hash(study.model, study.revision)
        given = ""
        if self.spec.directions:
            path = expand(self.spec.directions)
            if not path.is_file():
                raise LeewayError(f"probe.directions: {path}: no such file", fix="give a directions.safetensors")
            with readable(path):
                given = file_digest(path)
        return digest("probe base", VERSION, model, str(study.weight_dtype), self.prompts.hash, self.tree.hash, given)

    def directions_path(self) -> Path:
        return self.folder / "directions.safetensors"

    def part(self, job: Job, measure: Measure) -> Path:
        return self.folder / f"{job.alias}-s{job.seed}-{job.budgets[0]}-{measure}.parquet"

    def has_part(self, job: Job, measure: Measure) -> bool:
        """Return whether a measure of a checkpoint was written under the present settings."""
        return self.store.has_learning(self.part(job, measure), self._hash(job, measure))

    def is_complete(self, job: Job) -> bool:
        if job.alias == BASE:
            return self._base_facts().get("hash") == self.base_hash and self.directions_path().is_file()
        return all(self.has_part(job, measure) for measure in self._measures(job))

    def _measures(self, job: Job) -> list[Measure]:
        return [m for m in self.spec.measures if not job.measures or m in job.measures]

    def _base_facts(self) -> dict[str, Any]:
        path = self.folder / "base.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def _hash(self, job: Job, measure: Measure) -> str:
        own: list[object] = []
        if measure == "mediation":
            own = [list(self.spec.attacks), self.spec.mediation]
        elif measure == "depth":
            own = [(a.item_id, digest(a.answer)) for a in self.answers]
        return digest("probe", VERSION, self.base_hash, measure, own, job.alias, job.seed, job.budgets)

    @cached_property
    def answers(self) -> tuple[HarmfulAnswer, ...]:
        """One harmful answer to each test prompt, as the base or a checkpoint gave it; none in a redacted run."""
        if not self.store.rows_path.is_file():
            return ()
        rows = pd.read_parquet(self.store.rows_path)
        own = rows[(rows["eval"] == "jailbreak") & (rows["outcome"] == "harmful")]
        by_id = {p.id: p.text for p in self.prompts.of("test", "harmful")}
        own = own[own["item_id"].isin(by_id)]
        found = []
        for item, at in own.groupby("item_id", sort=True):
            answer = min(at["response"], key=lambda text: digest("probe answer", text))
            found.append(HarmfulAnswer(str(item), by_id[str(item)], str(answer)))
        return tuple(found)

    def context(self, pair: ModelPair, prefix: str = "") -> ProbeContext:
        jailbreak = next((e for e in self.prepared.evals if isinstance(e, Jailbreak)), None)
        if jailbreak is not None:
            known = {a.name: a for a in jailbreak.attacks}
            unknown = [a for a in self.spec.attacks if a not in known]
            if unknown and self.spec.attacks != ProbeSpec().attacks:
                what = f"probe.attacks: the study does not measure {unknown[0]!r}"
                raise LeewayError(what, fix=f"one of: {', '.join(known)}")
            chosen = [known[a] for a in self.spec.attacks if a in known] or list(jailbreak.attacks[:1])
            jailbreak = replace(jailbreak, attacks=chosen, samples=0, temperature=0.0)
        extras: dict[str, Any] = {"jailbreak": jailbreak, "organism": self.is_organism}
        extras["mediation_prompts"] = self.spec.mediation
        positions = Positions.of(pair.checkpoint.model.chat)
        return ProbeContext(pair, self.prompts, self.tree, positions, prefix=prefix, extras=extras)

    def run_base(self, base: Model) -> None:
        """Compute (or read) the base's directions and its persona vectors, and write them."""
        context = self.context(ModelPair.of(base, base))
        blocks = context.pair.base.blocks
        if self.spec.directions:
            directions = Directions.load(expand(self.spec.directions))
            width = int(base.lm.config.get_text_config().hidden_size)
            directions.check(base.hash, width, len(blocks), context.positions.names)
        else:
            directions = compute(context)
        directions.save(self.directions_path())
        traits = self._traits() if "persona" in self.spec.measures else {}
        own = persona_shift.vectors(context, traits)
        tensors = {f"unit/{t}": v.contiguous() for t, v in own.unit_LD.items()}
        tensors |= {f"halves/{t}": v.contiguous() for t, v in own.halves_L.items()}
        with atomic_write(self.folder / "persona.safetensors") as scratch:
            save_file(tensors or {"none": torch.zeros(1)}, scratch)
        if "persona" in self.spec.measures and not self.prepared.external:
            self._project_data(context, own)
        write_json(self.folder / "base.json", {"hash": self.base_hash, "persona": own.source})

    def _project_data(self, context: ProbeContext, own: persona_shift.PersonaVectors) -> None:
        """Write the projection of the training answers: what the data alone predict of the drift."""
        spec = self.prepared.spec
        try:
            examples = subset(train_examples(spec)[0], self.spec.prompts, "probe data")
        except LeewayError as error:  # the data of a finished run need not be at hand
            values = [Value("persona-data", reason=f"the training data could not be read ({error.what})")]
        else:
            context.extras["persona"] = own  # type: ignore[index]
            values = persona_shift.of_data(context, examples)
        records = [{"objective": DATA, "seed": 0, "budget": 0, **asdict(v)} for v in values]
        self.store.write_probe(self.folder / "data.parquet", records, self.base_hash)

    def _traits(self) -> dict[str, Sequence[PersonaItem]]:
        own = self.prepared.spec.evals.persona
        if own is None:
            return {}
        if own.source == "organism":
            return {t: world.persona_items(t, persona_shift.ITEMS) for t in own.traits}
        return {t: persona.anthropic(t)[0] for t in own.traits}

    def run_checkpoint(self, job: Job, pair: ModelPair, prefix: str) -> None:
        """Measure one checkpoint and write its values."""
        context = replace(self.context(pair, prefix), directions=self.directions(), answers=self.answers)
        context.extras["persona"] = self._persona()  # type: ignore[index]
        identity = {"objective": job.alias, "seed": job.seed, "budget": job.budgets[0]}
        for name in (m for m in self._measures(job) if not self.has_part(job, m)):
            records = [{**identity, **asdict(v)} for v in RUN[name](context)]
            self.store.write_probe(self.part(job, name), records, self._hash(job, name))
        if self.spec.states and self._measures(job)[-1] == self.spec.measures[-1]:  # one of a checkpoint's jobs
            self._write_states(job, context)

    def _write_states(self, job: Job, context: ProbeContext) -> None:
        """Write the residual stream of both models at the window's positions, with the prompts' ids in the metadata.

        `base` and `checkpoint`: [layers, prompts, positions, D] float32, for those who train autoencoders on them.
        """
        prompts = (*self.prompts.of("test", "harmful"), *self.prompts.of("test", "harmless"))
        sides = {"base": context.pair.base, "checkpoint": context.pair.checkpoint}
        tensors = {name: states(context, side, prompts) for name, side in sides.items()}
        facts = {"prompts": [p.id for p in prompts], "positions": context.positions.names}
        name = f"{job.alias}-s{job.seed}-{job.budgets[0]}-states.safetensors"
        with atomic_write(self.folder / name) as scratch:
            save_file(tensors, scratch, {"leeway_states": json.dumps(facts)})

    def directions(self) -> Directions:
        return Directions.load(self.directions_path())

    def _persona(self) -> persona_shift.PersonaVectors:
        tensors = load_file(self.folder / "persona.safetensors")
        by_kind = {
            kind: {k.removeprefix(f"{kind}/"): v for k, v in tensors.items() if k.startswith(f"{kind}/")}
            for kind in ("unit", "halves")
        }
        return persona_shift.PersonaVectors(by_kind["unit"], by_kind["halves"], self._base_facts().get("persona", ""))

    def collect(self) -> dict[str, Any]:
        """Write `probe.parquet` and `probe-contrasts.parquet` from all parts; return the manifest's section.

        Parts of earlier probes of this run count too, whatever checkpoints and measures this one is about.
        """
        every = probe_jobs(self.prepared, chosen=False)
        found = [(job, m) for job in every if job.alias != BASE for m in MEASURES if self.has_part(job, m)]
        parts = [self.store.read_probe(self.part(job, m)).to_pandas() for job, m in found]
        if self.store.has_learning(self.folder / "data.parquet", self.base_hash):
            parts.append(self.store.read_probe(self.folder / "data.parquet").to_pandas())
        values = pd.concat(parts, ignore_index=True)
        table, paired = mechanism.summarise(values), mechanism.contrasts(values, self.spec.reference)
        self.store.write_probe_tables(table, paired)
        own, given = self.directions(), self.prompts
        size = {s: {k: len(given.of(s, k)) for k in ("harmful", "harmless")} for s in given.sets}
        return {
            "measures": [m for m in MEASURES if any(own == m for _, own in found)],
            "reference": self.spec.reference,
            "prompts": {"n": size, "origins": dict(given.origins), "hash": given.hash},
            "openings": {"version": openings()[0], "hash": self.tree.hash},
            "direction": {
                "layer": own.layer,
                "position": own.position,
                "limits": own.limits,
                "plain": list(own.plain),
                "selection": [asdict(c) for c in own.table],
                "layers": len(own.mean_LPD),
                "file": "probe/directions.safetensors",
            },
            "persona": self._base_facts().get("persona", ""),
            "answers": len(self.answers),
        }


def of_data(probing: Probing, base: Model, examples: Sequence[Any]) -> pd.DataFrame:
    """Return measure 6 before training: the projection of each training answer, per trait and layer, summarised."""
    context = probing.context(ModelPair.of(base, base))
    context.extras["persona"] = persona_shift.vectors(context, probing._traits())  # type: ignore[index]
    values = persona_shift.of_data(context, examples)
    identity = {"objective": DATA, "seed": 0, "budget": 0}
    return mechanism.summarise(pd.DataFrame([{**identity, **asdict(v)} for v in values]))


def data_text(table: pd.DataFrame, examples: int) -> str:
    """Return the projections of training data as lines: one per trait, at the layer in the middle of the model."""
    lines = [f"{examples} training answers minus the base's own answers, along each trait's vector (length 1):"]
    for trait, own in table.groupby("detail", sort=True):
        middle = own[own["layer"] == int(own["layer"].median())].iloc[0]
        ends = f"{middle['value']:+.3f} [{middle['low']:+.3f}, {middle['high']:+.3f}]"
        random = f"random direction {middle['control']:+.3f}"
        lines.append(f"  {trait}: {ends} at layer {middle['layer'] + 1} ({random})")
    if (missing := table[table["reason"] != ""]) is not None and len(missing):
        lines += [f"  {reason}" for reason in missing["reason"].unique()]
    return "\n".join(lines)
