"""`leeway judge calibrate`: a judge against labels that people made, its answers kept, its card written."""

from __future__ import annotations

from pathlib import Path

from leeway.errors import LeewayError
from leeway.judges import ASKING, JUDGES, load_judge
from leeway.judges.calibrate import calibrate
from leeway.study.build_evals import HelperModels
from leeway.study.eval_spec import ModelRef


def calibrated(
    name: str, on: str, model: str | None, endpoint: str | None, key_env: str, out: Path
) -> tuple[str, Path]:
    """(the card as text, where it is kept); what an asked judge said stays in `out`, and is not paid for twice."""
    if endpoint and not model:
        raise LeewayError(f"judge {name}: an endpoint without a model", fix="give --model, the name it serves")
    if name in ASKING and not model:
        raise LeewayError(f"judge {name}: it asks a model, and none was named", fix="give --model")
    if name in JUDGES and name not in ASKING and model:
        raise LeewayError(f"judge {name}: it asks no model", fix="leave --model out")
    if not endpoint and key_env != ModelRef.model_fields["key_env"].default:
        raise LeewayError(f"judge {name}: --key-env is for an endpoint", fix="give --endpoint, or leave --key-env out")
    backend = None
    if model:
        speaker = ModelRef(model=model, endpoint=endpoint, key_env=key_env)
        backend = HelperModels(out / "helper_cache.sqlite").of(speaker)
    judge = load_judge(name, backend, **({"model": model} if model else {}))
    card = calibrate(judge, on)
    path = out / f"{judge.name}-{judge.hash}-{Path(on).stem}.json"
    card.save(path)
    return card.to_text(), path
