"""A run directory that was edited is refused in one line, before anything is computed from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import synthetic

from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.report.rebuild import replace_files
from leeway.report.results import Results
from leeway.report.validation import manifest_fault, table_fault
from leeway.study.ledger_report import view

LINE = {"objective": "sft", "seed": 0, "budget": 9, "eval": "jailbreak", "item_id": "a", "cluster": "a", "attack": None}
LINE |= {"score": 1.0, "response": "b", "new_tokens": 3}


def fault(**changes: Any) -> str:
    table = pd.DataFrame([{**LINE, **changes}])
    return table_fault(table, pa.Schema.from_pandas(table))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"score": float("nan"), "attack": "dan"}, ""),
        ({"score": float("inf")}, "column score has an infinite number"),
        ({"score": "1"}, "column score is string, not numbers"),
        ({"seed": -1}, "column seed has a negative number"),
        ({"seed": 0.5}, "column seed is double, not whole numbers"),
        ({"new_tokens": None}, "column new_tokens is null, not whole numbers"),
        ({"eval": None}, "column eval is null, not text"),
        ({"response": 3}, "column response is int64, not text"),
        ({"response": None}, ""),
        ({"step": 1, "objective": "../x"}, "column objective has '../x', which is no name of a folder"),
        ({"step": 1, "objective": ""}, "column objective has '', which is no name of a folder"),
        ({"objective": "owner/model"}, ""),
        ({"step": 1, "objective": ".."}, "column objective has '..', which is no name of a folder"),
    ],
)
def test_columns(changes: dict[str, Any], words: str) -> None:
    assert fault(**changes).replace("large_", "") == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"judges": []}, "judges is list, not an object"),
        ({"judges": {"jailbreak": {"name": 3}}}, "judges: 'jailbreak' is no object"),
        ({"judges": {"jailbreak": "keywords"}}, ""),
        ({"conditions": {"a": None}}, "conditions has a value that is not text"),
        ({"file_hashes": {"rows.parquet": 3}}, "file_hashes: 'rows.parquet' has no digest"),
        ({"file_hashes": {"rows.parquet": ["a", "b"]}}, ""),
        ({"objectives": {"sft": 1}}, "objectives: 'sft' is no object"),
        ({"matching": "source"}, "matching is str, not an object"),
        ({"started": 5}, "started is not text"),
    ],
)
def test_manifest(changes: dict[str, Any], words: str) -> None:
    assert manifest_fault({**synthetic.manifest(), **changes}) == words


@pytest.mark.parametrize("read", [Results.load, view])
@pytest.mark.parametrize("content", ["[]", "null", "3", '{"judges": [1]}', '{"matching": 1}', "[" * 100_000])
def test_a_manifest_of_another_shape(read: Callable[[Path], object], content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(LeewayError, match=r"manifest\.json") as found:
        read(tmp_path)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["../x.txt", "a/../../x.txt", "/x.txt"])
def test_no_file_is_written_outside_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match="lies outside it"):
        replace_files(tmp_path / "run", {name: "x"})
    assert not list(tmp_path.iterdir())


def test_a_row_with_an_odd_name_is_refused(tmp_path: Path) -> None:
    rows = synthetic.rows(("sft",), (25_000,), capability=2, prompts=2, items=2)
    folder = synthetic.write(tmp_path / "run", rows.assign(objective=rows["objective"].replace("sft", "../sft")))
    with pytest.raises(LeewayError, match=r"ledger\.parquet: column objective has '\.\./sft'"):
        Results.load(folder)
    assert json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("content", ["", "# study 0000\nname: x\n"])
def test_an_emptied_or_swapped_study_file(content: str, tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path, synthetic.rows(("sft",), (25_000,), capability=2, prompts=2, items=2))
    hashes = {"rows.parquet": file_digest(folder / "rows.parquet")}
    (folder / "manifest.json").write_text(json.dumps({**synthetic.manifest(), "file_hashes": hashes}))
    own = f"# study {synthetic.manifest()['study_hash']}\n{synthetic.STUDY}"
    (folder / "study.yaml").write_text(own)
    assert Results.load(folder).study["name"] == "demo"
    (folder / "study.yaml").write_text(content)
    with pytest.raises(LeewayError, match=r"study\.yaml is not the study of this run"):
        Results.load(folder)


def test_tables_being_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tables").touch()
    with pytest.raises(LeewayError, match="tables is a file, and a folder of the report"):
        replace_files(tmp_path, {"tables/x.csv": "x"})
