"""A report replaces and removes its own files, and never a user's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from leeway import report
from leeway.errors import LeewayError
from leeway.report import rebuild
from leeway.report.plotting import Drawing
from leeway.report.results import Results

pytestmark = [pytest.mark.slow, pytest.mark.figures]


def drawn(results: Results, *_: object) -> list[Drawing]:
    """Two figures without a line in them: the tests are about their files."""
    names = ["contrasts", *(["tradeoff"] if "jailbreak" in set(results.rows["eval"]) else [])]
    return [Drawing(n, n, n, n, f"<svg id='{n}'/>", n.encode(), n.encode()) for n in names]


@pytest.fixture(autouse=True, scope="module")
def _quick_figures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuild, "draw", drawn)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = synthetic.rows(("sft",), (25_000,), capability=1, prompts=4, items=4, attacks=("none",))
    folder = synthetic.write(tmp_path_factory.mktemp("run"), rows)
    report.build(folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def fewer_rows(run: Path) -> None:
    """Remove the jailbreak rows, so that some tables and figures are no longer made."""
    rows = pd.read_parquet(run / "rows.parquet")
    rows[rows["eval"] == "capability"].to_parquet(run / "rows.parquet")


def test_user_files_are_kept(run: Path) -> None:
    mine = [run / "figures" / "mine.png", run / "tables" / "mine.csv", run / "tables" / "mine.tex"]
    for path in mine:
        path.write_text("mine")
    edited = run / "figures" / "tradeoff.svg"
    edited.write_text("edited by hand")
    fewer_rows(run)
    report.build(run)
    assert [p.read_text() for p in mine] == ["mine"] * 3
    assert edited.read_text() == "edited by hand"
    assert not (run / "figures" / "tradeoff.png").exists()  # the report's own, and stale


@pytest.mark.parametrize("name", ["report.html", "figures/contrasts.png", "tables/rates.csv", "citation.bib"])
def test_user_file_at_a_target_path_is_rejected(name: str, run: Path) -> None:
    (run / name).write_text("mine")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(LeewayError, match=r"is not a file that the report wrote; move it away") as error:
        report.build(run)
    assert "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_symbolic_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run / "figures", elsewhere)
    (elsewhere / "mine.png").write_text("mine")
    (run / "figures").symlink_to(elsewhere)
    before = {p: p.read_bytes() for p in elsewhere.iterdir()}
    fewer_rows(run)
    with pytest.raises(LeewayError, match=r"figures is a symbolic link; move it away"):
        report.build(run)
    assert {p: p.read_bytes() for p in elsewhere.iterdir()} == before
    (run / "figures").unlink()
    (tmp_path / "page").write_text("mine")
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(tmp_path / "page")
    with pytest.raises(LeewayError, match=r"report.html is a symbolic link; move it away"):
        report.build(run)
    assert (tmp_path / "page").read_text() == "mine"
    (run / "report.html").unlink()
    report.build(run)


def test_killed_report_can_be_rebuilt(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer_rows(run)
    real, calls = rebuild.write_file, 0

    def stop(path: Path, content: str | bytes) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(rebuild, "write_file", stop)
        with pytest.raises(KeyboardInterrupt):
            report.build(run)
    report.build(run)
    assert not (run / "figures" / "tradeoff.png").exists()
