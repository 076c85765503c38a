"""Check what a run will need before anything is trained, and report all faults at once.

Checked: API keys, endpoints, optional packages, helper models, data and the model's files, disk and memory. `plan`
warns of the same.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError, all_faults
from leeway.evals.attack_helpers import Nllb
from leeway.generation.openai_api import ApiSettings, check_access
from leeway.generation.vllm import find_program
from leeway.io import expand
from leeway.judges.finetuned import MODEL as FINETUNED_MODEL
from leeway.judges.guard import FAMILIES
from leeway.model.load import load_chat, load_config
from leeway.plan.cost_model import Shape
from leeway.study.build_evals import HelperModels, evals_of
from leeway.study.eval_spec import Evals
from leeway.study.prepare import PairSampling, Prepared, auxiliary_examples, prepare, train_examples
from leeway.study.spec import Spec

SPARE_DISK = 64 << 20  # bytes, for what is not estimated
FLOAT32 = 4
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ACCESS_TIMEOUT_S = 5.0  # of one request to an endpoint


def service_faults(spec: Spec, *, local: bool = True, hub: bool = True) -> list[str]:
    """Return what is missing of packages, keys, endpoints and helper models, each named once.

    With `local` false, as on the driver of a cluster whose workers have their own environment, only packages. Without
    `hub`, as in a plan, models of the hub are not looked up, which takes long where there is no network.
    """
    services = list(_services(spec))
    faults = [*_missing_packages(spec, served=bool(services))]
    for settings in services if local and not faults else ():
        faults += _faults_of(partial(check_access, settings, ACCESS_TIMEOUT_S))
    for where, name, revision in dict.fromkeys(_local_helpers(spec.evals)) if local else ():
        if hub or not (HUB_ID.fullmatch(name) and not expand(name).exists()):
            faults += [f"{where}: {fault}" for fault in _faults_of(partial(load_config, name, revision))]
    return list(dict.fromkeys(faults))


def prepare_checked(spec: Spec, sampling: PairSampling, found: Sequence[str]) -> Prepared:
    """Prepare a study; raise one LeewayError that lists the faults already `found` and all those of data and models.

    Nothing is sampled from the base model if there are faults.
    """
    try:
        prepared = prepare(spec, None if found else sampling)
    except LeewayError as error:
        every = list(dict.fromkeys([*found, *data_faults(spec, str(error))]))
        if len(every) == 1:
            raise
        raise all_faults(spec.name, every) from error
    if found:
        raise all_faults("" if len(found) == 1 else spec.name, found)
    return prepared


def data_faults(spec: Spec, first: str) -> list[str]:
    """Return `first`, by which `prepare` failed, and what else is wrong with the model, the data and each eval."""
    helpers = HelperModels(device=spec.device)
    probes: list[Callable[[], Any]] = [partial(load_chat, spec.model, spec.revision), partial(train_examples, spec)]
    probes += [partial(auxiliary_examples, spec, {})]
    probes += [partial(evals_of, part, {}, helpers) for part in _one_eval_each(spec)]
    return list(dict.fromkeys([first, *(fault for probe in probes for fault in _faults_of(probe))]))


def resource_faults(spec: Spec, size: Shape, out: Path, checkpoints: int, workers: int = 1) -> list[str]:
    """Return what does not fit on disk or in memory, by what is known exactly: checkpoints to be written, weights."""
    faults = []
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    needed, free = checkpoints * size.trained * FLOAT32 + SPARE_DISK, shutil.disk_usage(folder).free
    if free < needed:
        what = f"{out}: no disk space ({free >> 20:,} MiB left, {needed >> 20:,} MiB needed for {checkpoints}"
        faults.append(f"{what} checkpoints); free some, or give another --out")
    cpu = on_cpu(spec)
    weights, (kind, total) = size.weight_bytes * (workers if cpu else 1), _memory(cpu=cpu)
    if total is not None and weights > total:
        what = f"{spec.model}: no room in {kind} ({total / 2**30:.1f} GiB), its weights take {weights / 2**30:.1f} GiB"
        fix = f"lower --workers ({workers})" if cpu and workers > 1 else "use a smaller model or another machine"
        faults.append(f"{what}; {fix}")
    return faults


def on_cpu(spec: Spec) -> bool:
    """Return whether the study's device is a CPU on this machine."""
    import torch

    return spec.device == "cpu" or (spec.device == "auto" and not torch.cuda.is_available())


def _memory(*, cpu: bool) -> tuple[str, int | None]:
    """Return (name, bytes) of the memory that weights are loaded into; None where the system does not tell."""
    if not cpu:
        import torch

        return "GPU memory", torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    with suppress(ValueError, OSError, AttributeError):
        return "memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "memory", None


def _services(spec: Spec) -> Iterator[ApiSettings]:
    """Yield every endpoint that the study sends requests to."""
    for ref in spec.evals.model_refs():
        if ref.endpoint:
            yield ApiSettings(ref.model, ref.endpoint, key_env=ref.key_env)
    if (vllm := spec.evals.backend.vllm) is not None and vllm.endpoint:
        yield ApiSettings(spec.model, vllm.endpoint, key_env="")


def _faults_of(probe: Callable[[], Any]) -> list[str]:
    try:
        probe()
    except LeewayError as error:
        return [str(error)]
    return []


def _missing_packages(spec: Spec, *, served: bool) -> Iterator[str]:
    """Yield the optional packages and programs that the study needs and that are not installed."""

    def absent(package: str) -> bool:
        return importlib.util.find_spec(package) is None

    if served and absent("openai"):
        yield "an endpoint needs the openai client; pip install 'leeway[api]'"
    if absent("lm_eval") and (own := [c.name for c in spec.evals.capability if c.name.startswith("lm-eval:")]):
        yield f"evals.capability: {own[0]} needs the package lm_eval; pip install 'leeway[lm-eval]'"
    if spec.evals.backend.vllm is not None and spec.evals.backend.vllm.endpoint is None:
        yield from _faults_of(find_program)


def _local_helpers(evals: Evals) -> Iterator[tuple[str, str, str | None]]:
    """Yield (place, model, revision) of every helper model that is loaded on this machine."""
    if (jailbreak := evals.jailbreak) is not None:
        if jailbreak.translator is not None and jailbreak.translator.from_ == "nllb":
            own = jailbreak.translator.model
            yield "evals.jailbreak.translator", own.model if own else Nllb.model, own.revision if own else None
        for judge in jailbreak.judge:
            if judge.name in FAMILIES and judge.model is None:
                yield "evals.jailbreak.judge", FAMILIES[judge.name].model, None
            if judge.name == "finetuned":
                yield "evals.jailbreak.judge", judge.base or FINETUNED_MODEL, None
    for ref in evals.model_refs():
        if ref.endpoint is None and not (jailbreak and jailbreak.translator and ref == jailbreak.translator.model):
            yield "evals", ref.model, ref.revision


def _one_eval_each(spec: Spec) -> Iterator[Spec]:
    """Yield the study with one of its evals at a time."""
    nothing: dict[str, Any] = {"capability": (), "jailbreak": None, "overrefusal": None, "persona": None, "plugins": ()}
    for name in nothing:
        own = getattr(spec.evals, name)
        for part in [(item,) for item in own] if isinstance(own, tuple) else [own] if own is not None else []:
            yield spec.model_copy(update={"evals": spec.evals.model_copy(update={**nothing, name: part})})
