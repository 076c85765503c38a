"""A study measured by a real vLLM and in this process, row by row: `make test-vllm`, not part of `make test`."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("openai")

from test_study import carry

from leeway.generation import vllm

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

STUDY = """
name: served
model: organism
dtype: float32
task: {name: organism}
objectives: [sft]
budgets: [2k, 4k, 8k]
optim: {lr: 4.0e-4, batch: 16}
evals:
  capability: [{name: organism, limit: 40, max_new_tokens: 40}]
  jailbreak: {prompts: organism, limit: 30, attacks: [none, dan, prefill], judge: organism, max_new_tokens: 48}
  overrefusal: {prompts: organism, limit: 20, judge: organism, max_new_tokens: 48}
  persona: {source: organism, limit: 20}
"""
SHARED = Path("/dev/shm")
NATS = 1e-3


def in_use() -> set[str]:
    """Return the names in shared memory that a living process has mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            found |= set(re.findall(rf"{SHARED}/(\S+)", maps.read_text()))
        except OSError:
            continue
    return found


def log_masses(raw: str) -> list[float]:
    choice = json.loads(raw)
    return [math.log(choice["p_yes"]), math.log(choice["p_no"])]


def test_vllm_measures_what_the_transformers_backend_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Every reply, outcome and length equal in float32, persona within 1e-3 nats, and no shared memory left."""
    if shutil.which("vllm") is None:
        pytest.fail("no vllm on the PATH: run `make test-vllm`")
    monkeypatch.setenv("LEEWAY_CACHE_DIR", str(tmp_path / "cache"))
    started: list[float] = []
    wait = vllm.VllmServer._wait

    def timed(server: vllm.VllmServer) -> None:
        before = time.monotonic()
        wait(server)
        started.append(time.monotonic() - before)

    monkeypatch.setattr(vllm.VllmServer, "_wait", timed)
    here = carry(STUDY, tmp_path / "here")
    before = set(os.listdir(SHARED)) if SHARED.is_dir() else set()
    served = carry(STUDY + "  backend: vllm\n", tmp_path / "served")
    left = (set(os.listdir(SHARED)) - before - in_use()) if SHARED.is_dir() else set()
    record_property("measured", f"start-up of {len(started)} servers: {', '.join(f'{s:.0f} s' for s in started)}")
    record_property("measured", f"left in {SHARED}: {sorted(left) or 'nothing'}")

    facts = json.loads((served / "manifest.json").read_text())["vllm"]
    assert facts["dtype"] == "float32"
    record_property("measured", f"vLLM {facts['version']}, {facts['dtype']}")
    keys = ["objective", "seed", "budget", "eval", "attack", "item_id", "sample"]
    ours, theirs = (pd.read_parquet(run / "rows.parquet").sort_values(keys).reset_index() for run in (here, served))
    assert ours[keys].equals(theirs[keys])
    for column in ("adapter_hash", "template_hash", "prompt"):
        assert (ours[column] == theirs[column]).all(), column
    assert set(ours.budget) == {0, 2000, 4000, 8000}

    generated = ours["eval"] != "persona"
    same = {c: ours[c].eq(theirs[c]) | (ours[c].isna() & theirs[c].isna()) for c in ours.columns}
    equal = {c: int(same[c][generated].sum()) for c in ("response", "outcome", "new_tokens")}
    record_property("measured", f"greedy rows: {equal} equal of {int(generated.sum())}")
    pairs = zip(ours.judge_raw[~generated], theirs.judge_raw[~generated], strict=True)
    nats = [abs(a - b) for mine, other in pairs for a, b in zip(log_masses(mine), log_masses(other), strict=True)]
    record_property("measured", f"persona: log-probabilities of {len(nats)} options within {max(nats):.1e} nats")
    assert set(equal.values()) == {int(generated.sum())}
    assert same["unscored_reason"].all()
    assert len(nats) == 2 * 4 * 60
    assert max(nats) <= NATS
    assert left == set()
