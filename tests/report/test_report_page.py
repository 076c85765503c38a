"""The page: complete, safe to open, deterministic."""

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from leeway import report
from leeway.report.page.page import VENDORED
from leeway.report.page.transcripts import embed_rows

pytestmark = pytest.mark.slow

VENDOR = Path(report.__file__).parent / "page" / "vendor"
SMALL = {"capability": 40, "prompts": 30, "items": 30}


def small() -> pd.DataFrame:
    rows = synthetic.rows(("sft", "cft", "kl"), (25_000, 100_000), **SMALL)
    rows["response"] = rows["response"].where(rows["eval"] != "capability", synthetic.HOSTILE + rows["response"])
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synthetic.write(tmp_path_factory.mktemp("run"), small())
    report.build(folder)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def own(page: str) -> str:
    """Return the page without the vendored scripts."""
    for name in VENDORED:
        page = page.replace((VENDOR / f"{name}.min.js").read_text("utf-8"), "")
    return page


def contents(folder: Path) -> dict[str, bytes]:
    made = ["results.json", "report.html", *(f"tables/{n}" for n in os.listdir(folder / "tables"))]
    made += [f"figures/{n}" for n in os.listdir(folder / "figures")]
    return {name: (folder / name).read_bytes() for name in sorted(made)}


def test_all_files_and_sections_exist(run: Path, page: str):
    names = set(contents(run))
    figures = ["contrasts", "tradeoff", "by-budget", "by-attack", "outcomes", "persona"]
    assert {f"figures/{f}.{end}" for f in figures for end in ("svg", "png")} <= names
    tables = ["rates", "contrasts", "frontier", "outcomes", "persona", "unscored", "ledger"]
    assert {f"tables/{t}.csv" for t in tables} <= names
    sections = [
        "verdict",
        "design",
        "capability",
        "attacks",
        "persona",
        "ledger",
        "contrasts",
        "unscored",
    ]
    for section in [*sections, "transcripts", "reproduce"]:
        assert f'<section id="{section}"' in page
    assert "No evidence about real models" in re.sub(r"\s+", " ", page)
    assert "leeway demo --out leeway-demo" in page
    assert "5f2a9be1c0d3e4f6" in page


@pytest.mark.figures
def test_same_rows_give_the_same_bytes(run: Path, tmp_path: Path):
    first = contents(run)
    again = synthetic.write(tmp_path / run.name, small())
    report.build(again)
    assert contents(again) == first


def test_model_output_stays_text(page: str):
    page = own(page)
    scripts = re.findall(r"<script[^>]*>", page.lower())
    inert = re.compile(r'<script type="application/(json|octet-stream)" id="[a-z-]+">')
    assert scripts.count("<script>") == 4
    assert [s for s in scripts if not inert.fullmatch(s)] == ["<script>"] * 4
    assert "<img" not in page.lower()
    assert "&lt;script&gt;alert(" in page
    assert "{{ 7*7 }}" in page
    assert "\u202e" not in page
    assert "⟨U+202E⟩" in page


class Attributes(HTMLParser):
    """Collect all tags and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.found: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [(name, value or "") for name, value in attrs]


def test_page_loads_nothing_and_runs_only_its_own_script(page: str):
    seen = Attributes(own(page))
    assert not seen.tags & {"img", "link", "iframe", "object", "embed", "image", "base"}
    for name, value in seen.found:
        assert not name.startswith("on")
        assert name not in {"src", "srcset", "action", "data", "poster"}
        assert value.startswith(("#", "figures/", "tables/")) or not name.endswith("href")
        assert "url(" not in value.replace("url(#", "")
    assert not re.search(r"@import|url\(", page[page.index("<style>") : page.index("</style>")])
    assert "default-src 'none'" in page
    assert "unsafe" not in page[: page.index("<style>")]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 4
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page[: page.index("<style>")]
    assert "innerHTML" not in scripts[-1]
    assert not re.search(r"[^.\w](eval|Function)\(", scripts[-1])


def test_embedded_rows_are_complete(page: str):
    seen = synthetic.embedded(page)[["eval", "item", "response", "attack"]]
    expected = small().rename(columns={"item_id": "item"})[list(seen.columns)]
    keys = list(seen.columns)
    assert seen.sort_values(keys).to_numpy().tolist() == expected.sort_values(keys).to_numpy().tolist()


def test_rows_over_the_size_limit_are_left_out_and_stated():
    rows = synthetic.lengthened(small())
    whole = embed_rows(rows, synthetic.CONDITIONS, [])
    assert (whole.rows, whole.left_out) == (len(rows), "")
    size = len(whole.data)
    some = embed_rows(rows, synthetic.CONDITIONS, [], max_bytes=size // 4)
    assert len(base64.b64decode(some.data)) <= size // 4
    assert 0 < some.rows < some.of == len(rows)
    assert f"{len(rows) - some.rows:,} of {len(rows):,} rows" in some.left_out
    assert "judge_raw" in some.left_out


def test_ids_are_unique(page: str):
    page = own(page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page):
        assert target in ids


def test_charts_have_a_description_and_safe_data(page: str):
    specs = re.findall(r'<script type="application/json" id="spec-([a-z-]+)">(.*?)</script>', page, re.DOTALL)
    assert {"tradeoff", "by-attack", "contrasts", "outcomes", "persona"} <= {name for name, _ in specs}
    for name, text in specs:
        assert "<" not in text
        spec = json.loads(text)
        assert len(spec["description"]) > 20
        assert all(d["point"] and d["reading"] for d in spec["data"]["values"] if "step" not in d), name


def test_harmful_responses_are_collapsed(page: str):
    section = page[page.index('<section id="transcripts"') :]
    assert synthetic.REPLY["harmful"] in section
    assert not re.search(r"<details open", page)
    outside = re.sub(r"<details>.*?</details>", "", section, flags=re.DOTALL)
    assert synthetic.REPLY["harmful"] not in outside
    assert synthetic.REPLY["refused"].replace("'", "&#39;") in outside


def test_results_json_is_strict_and_complete(run: Path):
    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((run / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["organism"] is True
    assert len(found["verdict"]) == 4
    assert "learned nothing" in found["verdict"][3]  # these rows have no learning check
    assert found["seeds"] == [0]
    assert len(found["contrasts"]) == len(pd.read_csv(run / "tables/contrasts.csv"))


@pytest.mark.figures
def test_second_report_removes_stale_files(tmp_path: Path):
    folder = synthetic.write(tmp_path, synthetic.rows(("sft",), (25_000,), **SMALL))
    report.build(folder)
    rows = pd.read_parquet(folder / "rows.parquet")
    rows[rows["eval"] == "capability"].to_parquet(folder / "rows.parquet")
    report.build(folder)
    assert sorted(os.listdir(folder / "figures")) == [
        "by-budget.pdf",
        "by-budget.png",
        "by-budget.svg",
        "contrasts.pdf",
        "contrasts.png",
        "contrasts.svg",
    ]
    assert not [n for n in os.listdir(folder) if "partial" in n]
    assert "needs both a capability" in (folder / "report.html").read_text(encoding="utf-8")


def test_long_response_is_truncated_and_counted(tmp_path: Path):
    rows = synthetic.rows(("sft",), (25_000,), capability=2, prompts=8, items=6, attacks=("none",))
    rows["response"] = rows["response"].where(rows["eval"] != "capability", "loop " * 200_000)
    page = report.build(synthetic.write(tmp_path, rows)).read_text(encoding="utf-8")
    assert "998,800 more characters not shown" in page
    assert len(page) < 1_000_000


@pytest.mark.figures
def test_other_shapes_of_study(tmp_path: Path):
    tiny = {"capability": 8, "prompts": 8, "items": 6}
    shapes = {
        "one attack": synthetic.rows(("sft",), (25_000,), attacks=("dan",), **tiny),
        "two seeds": synthetic.rows(("sft", "cft"), (8_192,), seeds=(0, 1), **tiny),
        "base only": synthetic.rows((), (), **tiny),
    }
    persona = synthetic.rows(("sft",), (25_000,), **tiny)
    shapes["persona only"] = persona[persona["eval"] == "persona"]
    unscored = synthetic.rows(("sft", "ip"), (25_000,), **tiny)
    unscored.loc[unscored["objective"] == "sft", ["score", "outcome"]] = [float("nan"), None]
    shapes["nothing scored"] = unscored
    for name, rows in shapes.items():
        page = report.build(synthetic.write(tmp_path / name, rows, organism=False)).read_text(encoding="utf-8")
        assert "No evidence about real models" not in re.sub(r"\s+", " ", page), name
        assert ">nan<" not in page.lower(), name
        assert ">None<" not in page, name
