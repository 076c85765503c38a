"""A redacted run gives the same numbers and holds no forbidden prompt and no answer to one."""

import json
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from leeway import report
from leeway.errors import LeewayError
from leeway.report.exports.redacted import publish


@pytest.mark.slow
@pytest.mark.parametrize("no_prompts", [False, True])
def test_same_numbers_without_the_texts(no_prompts: bool, tmp_path: Path) -> None:
    table = synthetic.rows(("sft",), (25_000,), capability=30, prompts=20, items=20)
    forbidden = table["eval"] == "jailbreak"
    table.loc[forbidden, "prompt"] = "forbidden-marker " + table.loc[forbidden, "prompt"]
    table.loc[forbidden, "response"] = "answer-marker"
    table.loc[forbidden, "judge_raw"] = "raw-marker"
    run = synthetic.write(tmp_path / "run", table)
    report.build(run)
    page = publish(run, tmp_path / "out", no_prompts=no_prompts)
    assert page == tmp_path / "out" / "report.html"
    before, after = pd.read_parquet(run / "rows.parquet"), pd.read_parquet(tmp_path / "out" / "rows.parquet")
    hidden = before["eval"] == "jailbreak"
    assert hidden.sum()
    assert (~hidden).sum()
    kept = [c for c in before.columns if c not in ("prompt", "response", "judge_raw")]
    pd.testing.assert_frame_equal(before[kept], after[kept])
    shown = [c for c in before.columns if c != "prompt" or not no_prompts]
    pd.testing.assert_frame_equal(before.loc[~hidden, shown], after.loc[~hidden, shown])
    assert after[~hidden]["prompt"].str.startswith("[prompt ").all() == no_prompts
    assert after[hidden]["prompt"].str.fullmatch(r"\[prompt [0-9a-f]{16}\]").all()
    assert after[hidden]["prompt"].nunique() == before[hidden]["prompt"].nunique()
    assert set(after[hidden]["judge_raw"]) == {""}
    tables = [json.loads((f / "results.json").read_text("utf-8")) for f in (run, tmp_path / "out")]
    assert {k: v for k, v in tables[0].items() if k != "columns"} == {
        k: v for k, v in tables[1].items() if k != "columns"
    }
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert not any(m in path.read_bytes() for m in (b"forbidden-marker", b"answer-marker", b"raw-marker")), path


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LeewayError, match="is not empty"):
        publish(tmp_path / "run", tmp_path)
