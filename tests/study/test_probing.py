"""A probe as part of a study, and of a finished run: same bytes after a kill, one line for each mistake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from leeway.audit.run import probe_again
from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.report.results import Results
from leeway.stats import mechanism
from leeway.study.jobs import Job
from leeway.study.probing import split_jobs
from leeway.study.run import Study
from leeway.yaml_config import load as load_yaml

PROBE = {"prompts": 12, "selection": 8, "mediation": 8, "measures": ["patching", "layers", "weights", "mediation"]}
STUDY = {
    "name": "probed",
    "model": "organism",
    "task": {"name": "organism", "limit": 200},
    "objectives": ["sft", "kl"],
    "budgets": ["1k"],
    "optim": {"lr": 1e-3, "warmup_steps": 0, "batch": 4},
    "evals": {"jailbreak": {"prompts": "organism", "limit": 24, "judge": "organism", "max_new_tokens": 24}},
    "controls": {"learning": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "run"
    Study.from_dict({**STUDY, "probe": PROBE}).run(out, quiet=True)
    return out


def _digests(run: Path) -> dict[str, str]:
    return {p.name: file_digest(p) for p in (run / "probe.parquet", run / "probe-contrasts.parquet")}


def test_a_study_with_a_probe_has_its_tables_and_says_how_it_was_made(run: Path) -> None:
    table = pd.read_parquet(run / "probe.parquet")
    assert list(table.columns) == mechanism.COLUMNS
    assert set(table["measure"]) >= {"patching-effect", "leave-one-out-effect", "one-alone-effect", "weight-norm"}
    assert set(table["objective"]) == {"sft", "kl"}
    facts = Results.load(run).manifest["probe"]
    assert facts["prompts"]["n"]["test"] == {"harmful": 12, "harmless": 12}
    assert facts["direction"]["selection"]
    assert load_yaml((run / "study.yaml").read_text("utf-8"))["probe"]["prompts"] == 12


def test_a_lost_part_is_measured_again_with_the_same_bytes(run: Path) -> None:
    before = _digests(run)
    part = run / "probe" / "sft-s0-1000-patching.parquet"
    was = file_digest(part)
    part.unlink()
    (run / "probe.parquet").unlink()
    (run / "probe-contrasts.parquet").unlink()
    probe_again(run, PROBE)
    assert file_digest(part) == was
    assert _digests(run) == before


def test_other_measures_are_added_to_a_finished_run(run: Path) -> None:
    before = pd.read_parquet(run / "probe.parquet")
    found = Results.load(run).probe(**PROBE | {"measures": ["geometry"], "objectives": ["sft"]})
    assert set(found["measure"]) - set(before["measure"]) >= {"direction-cosine", "direction-auroc"}
    assert len(found[found["measure"].isin(before["measure"])]) == len(before)  # nothing earlier is lost


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objectives": ["stf"]}, "no objective 'stf'"),
        ({"budgets": [7000]}, "no checkpoint at 7,000 tokens"),
        ({"measures": ["pathcing"]}, "measures"),
        ({"prompts": 3}, "prompts"),
        ({"attacks": ["dna"]}, "does not measure 'dna'"),
        ({"directions": "/nowhere/d.safetensors"}, "d.safetensors"),
    ],
)
def test_a_mistake_is_one_line(run: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(LeewayError, match=says) as caught:
        probe_again(run, {**PROBE, **options})
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_gone_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "kl")
    with pytest.raises(LeewayError, match="the checkpoint of kl s0 at 1,000 tokens is not in"):
        probe_again(copy, PROBE)


def test_several_workers_share_the_measures_of_a_checkpoint() -> None:
    base = Job("probe", "base")
    checkpoint = Job("probe", "sft", 0, (1_000,), (base,))
    parts = split_jobs([base, checkpoint], ("geometry", "layers", "patching", "depth"))
    assert [p.measures for p in parts] == [(), ("layers",), ("patching",), ("geometry", "depth")]
    assert all(p.after == (base,) and p.budgets == (1_000,) for p in parts[1:])


def test_a_probe_changes_no_hash_of_a_study() -> None:
    assert Study.from_dict(STUDY).spec.hash == Study.from_dict({**STUDY, "probe": PROBE}).spec.hash


def test_training_answers_are_projected_before_training_and_compared_with_the_drift() -> None:
    place = {"layer": 0, "site": "resid", "position": "-1"}
    lines = [
        {"objective": "data", "seed": 0, "budget": 0, "measure": "persona-data", "detail": t, "value": v, **place}
        for t, v in zip("abcdef", (0.5, 0.4, 0.3, 0.2, 0.1, -0.1), strict=True)
    ]
    drift = pd.DataFrame(
        {"objective": "sft", "seed": 0, "budget": 8, "trait": list("abcdef"), "difference": [6, 5, 4, 3, -1, -2]}
    )
    found = mechanism.prediction(pd.DataFrame(lines, columns=mechanism.COLUMNS), drift)
    assert found["agrees"].tolist() == [True, True, True, True, False, True]
    assert found["rank_correlation"].tolist() == [1.0] * 6
    few = mechanism.prediction(pd.DataFrame(lines[:3], columns=mechanism.COLUMNS), drift)
    assert few["rank_correlation"].isna().all()
