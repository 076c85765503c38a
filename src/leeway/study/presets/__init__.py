"""Studies that ship with Leeway, one YAML file each."""

from __future__ import annotations

from importlib.resources import files

from leeway.errors import LeewayError

PRESETS: dict[str, str] = {
    "demo": "the embedded organism, six objectives, a few minutes on a CPU, no download",
    "real-data": "GSM8K, StrongREJECT and Anthropic's persona statements, on any local or hub model",
    "objective-matters": "the study of arXiv 2601.12639 on Llama-3.1-8B-Instruct; scales down to the organism",
}


def preset_text(name: str) -> str:
    if name not in PRESETS:
        raise LeewayError(f"no preset {name!r}", fix=f"one of: {', '.join(PRESETS)}")
    return (files("leeway.study.presets") / f"{name}.yaml").read_text("utf-8")
