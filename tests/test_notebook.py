"""The tutorial notebook runs: in a real kernel where one is installed, and always cell by cell with a stand-in."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from leeway import Study
from leeway.study.screen import NotebookView, notebook

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


class Shown:
    """What a notebook displays, by display: later versions replace earlier ones."""

    def __init__(self) -> None:
        self.versions: list[list[str]] = []

    def display(self, html: str, *, display_id: bool = False) -> Any:
        own = [html]
        self.versions.append(own)
        return SimpleNamespace(update=own.append) if display_id else None


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """A process that looks like a notebook's kernel."""
    found = Shown()
    module = ModuleType("IPython")
    module.version_info = (9, 0)  # type: ignore[attr-defined]  # matplotlib asks
    module.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    parts = ModuleType("IPython.display")
    parts.display, parts.HTML = found.display, str  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", parts)
    return found


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; return the value of its last line if that is an expression."""
    *before, last = ast.parse(source).body
    exec(compile(ast.Module(before, []), "cell", "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    exec(compile(ast.Module([last], []), "cell", "exec"), names)
    return None


def test_every_cell_runs_and_shows_its_value(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, names = json.loads(PAGE.read_text("utf-8")), dict[str, Any]()
    assert not any(c.get("outputs") for c in page["cells"])  # no stale output in the repository
    cells = ["".join(c["source"]) for c in page["cells"] if c["cell_type"] == "code"]
    study, plan, _, results, contrasts, rows = [run_cell(cell, names) for cell in cells]
    assert "name: notebook" in study._repr_html_()
    assert "<td>sft</td><td>0</td><td>4,000</td>" in plan._repr_html_()
    assert len(contrasts) == 2 * 4
    assert len(rows) == 3
    html = results._repr_html_()
    for part in ("<th>attack success</th>", "<th>SFT</th>", "At 4k tokens, ", "95% intervals"):
        assert part in html
    progress, arms = shown.versions  # one table that is redrawn, and the results
    assert any("waiting" in version for version in progress)
    assert "trained" in progress[-1]
    assert "100% | " in progress[-1]
    assert arms == [html]


def test_in_a_real_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(PAGE.parents[1] / "src"))
    page = nbformat.read(PAGE, as_version=4)
    nbclient.NotebookClient(
        page, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    values = [c.outputs for c in page.cells if c.cell_type == "code"]
    htmls = ["".join(o.get("data", {}).get("text/html", "") for o in outputs) for outputs in values]
    assert all(htmls), "every code cell shows a table"
    assert "trained" in htmls[2]
    assert "attack success" in htmls[3]


def test_a_process_without_a_notebook_has_no_view() -> None:
    assert notebook() is None


def test_names_are_escaped() -> None:
    view = NotebookView()
    view._lines.append("<script>")
    assert view.html() == "<div>&lt;script&gt;</div>"


def test_a_study_from_a_mapping_has_all_faults_at_once() -> None:
    with pytest.raises(Exception, match="study: ") as found:
        Study.from_dict({"name": "x", "lr": 1})
    assert "unknown key 'lr'; did you mean 'optim.lr'?" in str(found.value)
    assert "model is missing" in str(found.value)
