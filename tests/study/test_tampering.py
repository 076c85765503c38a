"""What is edited in a finished run directory is noticed, never published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reports import no_report
from test_stages import text
from test_study import carry

from leeway.errors import LeewayError
from leeway.report import build
from leeway.study.ledger_report import view

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_report")]

SWEEP = "lr: tuned, tune: {lrs: [1.0e-3], budget: 200, items: 4}"


@pytest.fixture(scope="module")
def study(models: dict[str, Path], root: Path) -> str:
    return text(models, root, "[sft]").replace("lr: 3.0e-3", SWEEP)


@pytest.fixture(scope="module")
def whole(study: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with no_report():
        return carry(study, tmp_path_factory.mktemp("tampered") / "whole")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def edit(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """As a notebook would: the same schema, other content."""
    table = pq.read_table(path)
    schema = table.schema
    pq.write_table(pa.Table.from_pandas(change(table.to_pandas()), schema=schema, preserve_index=False), path)


def test_a_part_with_other_scores_or_fewer_rows_is_refused(study: str, run: Path) -> None:
    part = next(run.glob("parts/sft-*-capability-*.parquet"))
    before = part.read_bytes()
    for change in (lambda d: d.assign(score=1 - d.score), lambda d: d.iloc[1:]):
        edit(part, change)
        with pytest.raises(LeewayError, match=r"capability.*parquet: damaged \(it was changed after it was written\)"):
            carry(study, run)
    part.unlink()
    carry(study, run)
    assert part.read_bytes() == before


@pytest.mark.parametrize("name", ["rows.parquet", "ledger.parquet"])
def test_an_edited_table_is_refused_and_rewritten(name: str, study: str, run: Path) -> None:
    before = (run / name).read_bytes()
    column = "score" if name == "rows.parquet" else "lr"
    edit(run / name, lambda d: d.assign(**{column: 1 - d[column]}))
    with pytest.raises(LeewayError, match=f"{name} is not the file that the run wrote"):
        build(run)
    assert f"{name} is not the file that the run wrote" in view(run).text
    carry(study, run)
    assert (run / name).read_bytes() == before
    assert not view(run).faults


def test_a_cost_in_a_checkpoints_ledger_is_not_laundered(study: str, run: Path) -> None:
    path = next(run.glob("checkpoints/sft/s0/*/ledger.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "processed_tokens": 7}))
    assert any("it was changed after it was written" in f for f in view(run).faults)
    with pytest.raises(LeewayError, match="it was changed after it was written"):
        carry(study, run)


def test_an_edited_choice_of_a_rate_is_refused(study: str, run: Path) -> None:
    path = run / "tuning" / "sft.json"
    path.write_text(path.read_text().replace("0.001", "0.003"))
    with pytest.raises(LeewayError, match=r"tuning/sft.json: damaged \(it was changed after it was written\)"):
        carry(study, run)


def test_an_edited_study_file_is_refused(study: str, run: Path) -> None:
    path = run / "study.yaml"
    path.write_text(path.read_text().replace("batch: 4", "batch: 5"))
    with pytest.raises(LeewayError, match=r"study.yaml was edited after the run began"):
        carry(study, run)


def test_a_start_that_was_replaced_is_named_before_anything_is_trained(
    whole: Path, models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    start, budgets = tmp_path / "start", sorted((whole / "checkpoints" / "sft" / "s0").iterdir())
    shutil.copytree(budgets[0], start)
    staged = text(models, root, f"[{{a: {{dpo: {{}}, start: {{adapter: {start}}}}}}}]")
    out = carry(staged, tmp_path / "run")
    shutil.rmtree(start)
    shutil.copytree(budgets[-1], start)
    for left in (out / "checkpoints" / "a", *out.glob("parts/a-*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    with pytest.raises(LeewayError, match="start of a has changed since this study began"):
        carry(staged, out)
    assert not (out / "checkpoints" / "a").exists()


def test_a_cache_alone_serves_another_study(study: str, run: Path) -> None:
    for left in run.iterdir():
        if left.name != "study.yaml":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    with pytest.raises(LeewayError, match="holds another study"):
        carry(study.replace("batch: 4", "batch: 5"), run)
    (run / "cache").mkdir()
    carry(study.replace("batch: 4", "batch: 5"), run)
