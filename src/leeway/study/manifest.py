"""The manifest: versions, hashes, command and environment of a run. No secrets: no environment variable is copied."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence as Seq
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from leeway.claims.schema import to_manifest
from leeway.data.ledger import Matching
from leeway.errors import LeewayError
from leeway.evals.eval import Eval
from leeway.hashing import digest
from leeway.io import expand
from leeway.model.forward import layout_of
from leeway.model.load import Model, model_hash, resolve
from leeway.model.packaged import origin
from leeway.objectives import OBJECTIVES, ip, sft_refusal
from leeway.plugins import source_hash
from leeway.report.formatting import mapping
from leeway.study.prepare import Prepared
from leeway.training.checkpoints import WarmStart

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pandas", "scipy", "statsmodels")


def check_unchanged(prepared: Prepared, facts: dict[str, Any], where: Path) -> None:
    """Raise LeewayError if evals, texts or model differ from those of an earlier run in this folder."""
    spec = prepared.spec
    now = {f"evals.{e.key}": e.hash for e in prepared.evals} | {"chat template": prepared.chat.template_hash}
    then = {f"evals.{key}": mapping(e).get("hash") for key, e in facts["evals"].items()}
    then["chat template"] = facts["model"].get("template_hash")
    if Path(resolve(spec.model)).is_dir():  # a hub id's commit is known once it is loaded, and compared by the ledger
        now["model"], then["model"] = model_hash(spec.model, spec.revision), facts["model"].get("hash")
    now |= {k: str(v) for k, v in _texts(prepared).items()}
    then |= {k: str(v) for k, v in facts.get("texts", {}).items()}
    for name in now:
        if now[name] != then.get(name):
            what = f"{where}: {name} has changed since this study began (hash {then.get(name)} then, {now[name]} now)"
            raise LeewayError(what, fix="start in another --out; rows of both would not be comparable")


def fingerprint(prepared: Prepared) -> str:
    """Return a hash of what a study trains and measures, by which another process can tell that it read the same.

    Empty without training data, as in a probe of a finished study: the manifest and the ledger cover what that reads.
    """
    if not prepared.schedules:
        return ""
    evals = {e.key: e.hash for e in prepared.evals} | {"chat template": prepared.chat.template_hash}
    orders = {f"{alias}-s{seed}": [m.data_hash for m in s.stops] for (alias, seed), s in prepared.schedules.items()}
    return digest("fingerprint", evals, _texts(prepared), orders, prepared.learning.hash)


def check_fingerprint(prepared: Prepared, expected: str, where: str) -> None:
    """Raise LeewayError if this process has read other data, prompts or texts than the run began with."""
    if expected and fingerprint(prepared) != expected:
        what = f"{prepared.spec.name}: the data have changed while the study runs ({where} reads other data)"
        raise LeewayError(what, fix="restore them and run the same command again, or start in another --out")


def _texts(prepared: Prepared) -> dict[str, str]:
    """Return hashes of everything rendered except the task's examples, which the ledger's data_hash covers."""
    pools = {kind: getattr(prepared.auxiliary_pool, kind) for kind in ("general", "safety")}
    starts = {o.alias: o.start.adapter for o in prepared.spec.objectives if o.start and o.start.adapter}
    return {
        "inoculations": ip.inoculations().hash,
        "refusals": sft_refusal.texts().hash,
        **{f"start of {alias}": WarmStart.of(expand(adapter)).hash for alias, adapter in starts.items()},
        **{  # another package's formula may change between two runs, and the study file would not
            f"source of {o.kind}": source_hash(type(prepared.objectives[o.alias]))
            for o in prepared.spec.objectives
            if o.kind not in OBJECTIVES
        },
        **{f"near-triggers of {alias}": t.to_json()["hash"] for alias, t in prepared.triggers.items()},
        **{k: digest(k, [[e.id, e.prompt, e.preferred] for e in pool]) for k, pool in pools.items() if pool},
    }


def matching(prepared: Prepared) -> Matching:
    """Return what must be equal across objectives in this study's ledger."""
    spec = prepared.spec
    return Matching(spec.budget.count, {o.alias: o.starts_at for o in spec.objectives if o.start})


def measured_with(evals: Seq[Eval], origins: dict[str, str]) -> dict[str, Any]:
    """Return the manifest's sections about evals, judges and environment."""
    facts: dict[str, dict[str, Any]] = {"attacks": {}}
    for section, entries in (entry for e in evals for entry in e.facts().items()):
        facts[section] = {**facts.get(section, {}), **entries}
    return {
        "leeway": version("leeway"),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"origins": origins},
        "evals": {e.key: {"hash": e.hash, "answers": len(e)} for e in evals},
        **facts,
        "judges": {  # an eval's first judge is under its key
            f"{e.key}@{judge.name}" if k else e.key: asdict(judge)
            for e in evals
            for k, judge in enumerate(e.judged_by())
        },
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            **{p: version(p) for p in PACKAGES},
        },
    }


def manifest(prepared: Prepared, model: Model, command: str) -> dict[str, Any]:
    """Return the manifest of a run: everything needed to know what was run, apart from the study file."""
    spec = prepared.spec
    measured = measured_with(prepared.evals, prepared.origins)
    return {
        **measured,
        "command": command,
        "study_hash": spec.hash,
        "resolved_defaults": list(spec.resolved_defaults),
        "organism": "organism" in (spec.model, spec.task.name),
        "model": {
            "name": spec.model,
            "revision": spec.revision,
            "hash": model.hash,
            "origin": origin(Path(resolve(spec.model))) or None,
            "parameters": model.parameters,
            "dtype": str(model.head.weight_VD.dtype).removeprefix("torch."),
            "device": str(model.device),
            "context": model.context,
            "template_hash": model.chat.template_hash,
        },
        "data": {
            **measured["data"],
            "examples": prepared.examples,
            "left_out": {"count": len(prepared.left_out), "ids": list(prepared.left_out)},
            "pairs": prepared.pairs.to_json() if prepared.pairs else spec.pairs.from_,
        },
        "objectives": {
            alias: {"kind": o.name, **getattr(o, "__dict__", {})} for alias, o in prepared.objectives.items()
        },
        "matching": matching(prepared).to_json(),
        "optimisation": {
            "optimiser": "AdamW (decoupled weight decay), betas 0.9 and 0.999, epsilon 1e-8",
            "learning_rate": {alias: spec.optim.lr_of(alias) or "tuned" for alias in prepared.objectives},
            "warmup": f"linear over {spec.optim.warmup_steps} steps",
            "schedule": spec.optim.schedule,
            "gradient_clipping": f"global norm {spec.optim.clip:g}",
            "weight_decay": spec.optim.weight_decay,
            "examples_per_step": spec.optim.batch,
            "adapter": spec.adapter.model_dump(mode="json"),
            "reference": spec.reference,
            "layout": layout_of(spec.optim.layout, model, spec.adapter.kind),
        },
        "inoculations": {"version": ip.inoculations().version},
        "refusals": {"version": sft_refusal.texts().version},
        **({"triggers": {a: t.to_json() for a, t in prepared.triggers.items()}} if prepared.triggers else {}),
        "texts": _texts(prepared),
        **({"claims": to_manifest(spec.claims)} if spec.claims else {}),
        "environment": {**measured["environment"], "threads": torch.get_num_threads()},
    }
