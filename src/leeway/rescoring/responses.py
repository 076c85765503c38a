"""The stored answers of a finished run as judges and annotators read them: with the bare prompt, without the attack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from pydantic import ValidationError

from leeway.errors import LeewayError
from leeway.evals.eval import NO_ANSWER
from leeway.report.formatting import mapping
from leeway.report.results import Results
from leeway.stats.metrics import DIRECT
from leeway.study.build_evals import forbidden_prompts
from leeway.study.eval_spec import JailbreakSpec
from leeway.yaml_config import faults

JUDGED_EVALS = ("jailbreak", "overrefusal")  # those whose answers a `Judge` scores
Row = Mapping[str, Any]


def require_answers(results: Results, axis: str, known: Seq[str] = JUDGED_EVALS) -> str:
    """Return the name of the eval's primary judge. Raises LeewayError if the run has no answers of that eval."""
    folder = results.folder
    if axis not in known:
        raise LeewayError(f"--eval {axis}: no judge reads its answers", fix=f"one of: {', '.join(known)}")
    if axis not in results.judges or not (results.rows["eval"] == axis).any():
        raise LeewayError(f"{folder} has no answers of {axis}", fix="name an eval that the run measured")
    if results.manifest.get("redacted"):
        fix = "use the run directory that it was exported from"
        raise LeewayError(f"{folder} is redacted: it has hashes in place of prompts and answers", fix=fix)
    return results.judges[axis]


def has_no_answer(row: Row) -> bool:
    """Whether there is no response to judge: the model, a helper or the attack failed, not the judge."""
    reason = row["unscored_reason"] or ""
    return not row["judge_raw"] and reason.startswith((NO_ANSWER, "attack: "))


def bare_prompts(rows: Iterable[Row], study: Mapping[str, Any], axis: str) -> dict[str, str]:
    """Return the prompt of each item as judges read it.

    Benign prompts are sent as they are, forbidden ones only without an attack; without such rows they are read from the
    study's prompts. Raises LeewayError if an item is in neither.
    """
    rows, prompts = list(rows), dict[str, str]()
    for row in rows:
        if axis != "jailbreak" or row["attack"] == DIRECT:
            prompts[row["item_id"]] = row["prompt"]
    if missing := {row["item_id"] for row in rows} - prompts.keys():
        part = _jailbreak_spec(study)
        prompts = {p.id: p.text for p in forbidden_prompts(part)[0]} | prompts
        if unknown := sorted(missing - prompts.keys()):
            what = f"the prompt {unknown[0]} is not among the study's prompts ({part.prompts})"
            raise LeewayError(what, fix="restore the prompts that the study was run with")
    return prompts


def _jailbreak_spec(study: Mapping[str, Any]) -> JailbreakSpec:
    try:
        return JailbreakSpec.model_validate(mapping(mapping(study.get("evals")).get("jailbreak")))
    except ValidationError as error:
        what = f"study.yaml: evals.jailbreak: {'; '.join(faults(error, JailbreakSpec))}"
        raise LeewayError(what, fix="restore the file that the run wrote") from error
