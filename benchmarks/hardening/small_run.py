"""A small finished run of the organism, made once, on which campaigns try their inputs."""

from __future__ import annotations

from pathlib import Path

STUDY = """
name: small
model: organism
task: organism
objectives: [sft, cft]
budgets: [1k, 2k]
seeds: [0]
optim: {lr: 1e-3, batch: 8, warmup_steps: 2}
evals:
  capability: [{name: organism, limit: 12, max_new_tokens: 24}]
  jailbreak: {prompts: organism, limit: 12, attacks: [none, dan], judge: [organism, keywords], max_new_tokens: 24}
  overrefusal: {prompts: organism, limit: 12, max_new_tokens: 24}
  persona: {source: organism, limit: 12}
controls: {learning: {items: 8, general: 4}}
claims: [{id: harm, statement: "SFT raises attack success.", kind: moves, measure: asr, objectives: sft, direction: up}]
"""


def small_run(folder: Path) -> Path:
    """Return `folder`/run, after running the study into it if it is not finished."""
    out = folder / "run"
    if (out / "report.html").is_file():
        return out
    from leeway.study.load import parse
    from leeway.study.progress import Reporter
    from leeway.study.run import run

    run(parse(STUDY, "small"), out, Reporter(quiet=True), "leeway run small.yaml", workers=1)
    return out
