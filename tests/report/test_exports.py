"""Exported files: LaTeX, BibTeX, figures, results.json and its schema, model cards."""

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pytest
import synthetic
from huggingface_hub import ModelCard

from leeway import report, yaml_config
from leeway.io import with_checksum
from leeway.report import formatting, narrative, rebuild
from leeway.report.exports import latex, model_card
from leeway.report.formatting import TOKENS
from leeway.report.results import Results

pytestmark = pytest.mark.slow

NASTY = r"50% of $x_1$ & \input{evil} #2 ~^ <b> [*] {a} |" "" + '" -- \u202e\U0001f600 Österreich – “q”'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synthetic.write(tmp_path_factory.mktemp("run"), rows())
    checkpoints(folder)
    report.build(folder)
    return folder


def rows() -> pd.DataFrame:
    return synthetic.rows(("sft", "cft"), (25_000, 100_000), capability=40, prompts=30, items=30)


def checkpoints(folder: Path) -> None:
    """Create checkpoint folders as training does; those of CFT have their own tokenizer."""
    for line in pd.read_parquet(folder / "ledger.parquet").to_dict("records"):
        own = folder / "checkpoints" / line["objective"] / f"s{line['seed']}" / str(line["budget"])
        own.mkdir(parents=True)
        (own / "ledger.json").write_text(json.dumps(with_checksum(line)))
        (own / "adapter_config.json").write_text("{}")
        if line["objective"] == "cft":
            (own / "tokenizer.json").write_text("{}")


# LaTeX


def cells(line: str) -> list[str]:
    """Split a line of a tabular at its unescaped ampersands."""
    return re.split(r"(?<!\\)&", line.removesuffix(r"\\"))


def check_tex(text: str) -> list[list[str]]:
    """Return the cells, after checking that the source is balanced and each line has the header's columns."""
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    bare = re.sub(r"\\[\\{}$&#%_]", "", re.sub(r"^%.*$", "", text, flags=re.MULTILINE))
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert "#" not in bare
    assert "%" not in bare
    assert not re.search(r"(?<!\$)_(?!\{)", bare)
    header, body = text.split(r"\toprule" + "\n", 1)[1].split(r"\midrule", 1)
    body = body.split(r"\endlastfoot" if r"\endlastfoot" in text else r"\bottomrule")[r"\endlastfoot" in text]
    lines = [cells(x) for x in (header + body.split(r"\end{longtable}")[0]).splitlines() if x.endswith(r"\\")]
    spec = re.search(r"\\begin\{(?:tabular|longtable)\}\{@\{\}(.*)@\{\}\}", text)
    assert spec
    columns = len(re.sub(r"p\{[^}]*\}", "p", spec.group(1)))
    assert {len(x) for x in lines} == {columns}
    return [[c.strip() for c in x] for x in lines]


def test_latex_tables_are_balanced_and_complete(run: Path):
    found = {p.stem: check_tex(p.read_text("utf-8")) for p in (run / "tables").glob("*.tex")}
    assert set(found) == {"main", "contrasts", "ledger"}
    assert found["main"][0][0:3] == ["Objective", "Budget", "Accuracy"]
    rates = pd.read_csv(run / "tables/rates.csv")
    base = rates[(rates["objective"] == "base") & (rates["condition"] == "plain") & (rates["measure"] == "accuracy")]
    rate, low, high = (100 * base.iloc[0][["rate", "low", "high"]].astype(float)).round(1)
    assert found["main"][1][:4] == ["base", "--", f"{rate:.1f}", f"[{low:.1f}, {high:.1f}]"]
    assert len(found["main"]) == 1 + 2 + 4  # header, two bases, two objectives at two budgets
    assert len(found["ledger"]) == 1 + 4


def test_significance_marks_follow_holm_and_are_explained(run: Path):
    text = (run / "tables/main.tex").read_text("utf-8")
    contrasts = pd.read_csv(run / "tables/contrasts.csv")
    moved = contrasts[contrasts["primary"] & (contrasts["p_holm"] < 0.05)]
    assert len(moved)
    body, notes = text.split(r"\end{tabular}")
    assert body.count(latex.SIGNIFICANT) == len(moved)
    assert "Holm" in notes
    assert latex.SIGNIFICANT in notes


def test_missing_rates_are_dashes_and_unscored_are_counted(tmp_path: Path):
    table = rows()
    table.loc[(table["objective"] == "sft") & (table["eval"] == "capability"), "score"] = float("nan")
    folder = synthetic.write(tmp_path, table)
    report.build(folder)
    body = check_tex((folder / "tables/main.tex").read_text("utf-8"))
    line = next(c for c in body if c[:2] == ["SFT", "25k"])
    assert line[2:4] == ["--", ""]
    assert int(line[-1]) >= 40


def test_latex_escapes_hostile_text():
    safe = latex.escape(NASTY)
    assert safe.startswith(r"50\% of \$x\_1\$ \& \textbackslash{}input\{evil\} \#2 ")
    assert "{[}{*}{]}" in safe
    assert "-{}-" in safe
    assert "{[}U+202E{]}" in safe
    assert "{[}U+1F600{]}" in safe
    assert safe.endswith("Österreich -- ``q''")
    table = latex.Table("x", "c", [("a", "l"), ("b", "r")], [[safe, "1"], [safe, "2"]])
    assert len(check_tex(latex.render(table))) == 3


def test_long_table_is_a_longtable():
    table = latex.Table(
        "x", "c", [("a", "l"), ("b", "r")], [[str(n), "1"] for n in range(latex.PAGE_ROWS + 1)], ["note"]
    )
    text = latex.render(table)
    assert "longtable" in text.split("\n")[0]
    assert len(check_tex(text)) == latex.PAGE_ROWS + 2


def test_claims_table():
    line = {"claim": "a", "statement": NASTY, "estimate": -0.123, "low": -0.2, "high": float("nan"), "unit": "share"}
    line |= {"p": 0.01, "p_holm": 0.02, "mde": 0.05, "verdict": "supported", "why": ""}
    found = latex.claims_table(pd.DataFrame([line]))
    assert found
    body = check_tex(latex.render(found))
    assert body[1][1:] == ["$-$0.123", "", "share", "0.020", "0.05", "supported"]
    assert latex.claims_table(pd.DataFrame()) is None
    assert latex.ledger_table(pd.DataFrame(), [], TOKENS) is None


# figures


def test_figures_are_svg_png_and_undated_pdf(run: Path):
    made: dict[str, set[str]] = {}
    for path in (run / "figures").iterdir():
        made.setdefault(path.stem, set()).add(path.suffix)
    assert made
    assert set(map(frozenset, made.values())) == {frozenset({".svg", ".png", ".pdf"})}
    for path in (run / "figures").glob("*.pdf"):
        raw = path.read_bytes()
        assert raw.startswith(b"%PDF-")
        assert b"CreationDate" not in raw
        assert b"/Subtype /Type3" not in raw


def test_pdf_is_equal_across_processes():
    code = """
import hashlib, sys
from matplotlib.figure import Figure
from leeway.report.plotting import finish, style
with style():
    figure = Figure(figsize=(3, 2))
    figure.subplots().set_title("Überfluss −3 $x$")
    print(hashlib.sha256(finish(figure, "a", "", "", "").pdf).hexdigest())
"""
    found = set()
    for seed in ("1", "2"):
        settings = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, check=True)
        found.add(done.stdout)
    assert len(found) == 1


# results.json


def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(rebuild.schema())
    return jsonschema.Draft202012Validator(rebuild.schema())


def read(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text("utf-8")))


def test_results_match_schema(run: Path):
    found = read(run)
    validator().validate(found)
    assert found["$schema"] == rebuild.schema()["$id"] == f"urn:leeway:results:{rebuild.FORMAT}"
    assert "://" not in rebuild.schema()["$id"]
    python = {"string": str, "number": (int, float), "integer": int, "boolean": bool, "null": type(None)}
    for name, columns in found["columns"].items():
        for record in found[name]:
            assert list(record) == list(columns)
            assert all(v is None or isinstance(v, python[columns[c]]) for c, v in record.items())


def broken() -> dict[str, Any]:
    """Return ways to break a valid file."""

    def drop(d: dict[str, Any]) -> None:
        del d["contrasts"]

    def column(d: dict[str, Any]) -> None:
        del d["contrasts"][0]["p_holm"]

    def set_at(table: str, key: str, value: object) -> Any:
        return lambda d: d[table][0].__setitem__(key, value)

    return {
        "another format": lambda d: d.__setitem__("format", 2),
        "a table is missing": drop,
        "a column is missing": column,
        "a rate over one": set_at("rates", "rate", 1.5),
        "a p-value below zero": set_at("contrasts", "p", -0.1),
        "a number as text": set_at("ledger", "step", "12"),
        "a count that is none": set_at("rates", "n", -1),
        "a cell that is a list": set_at("outcomes", "refused", [0.5]),
        "a verdict that is not one": lambda d: d.__setitem__("claims", [{"claim": "a", "verdict": "maybe"}]),
        "a further table that is none": lambda d: d.__setitem__("divergence", {"p": 0.1}),
        "organism as text": lambda d: d.__setitem__("organism", "yes"),
    }


@pytest.mark.parametrize("how", broken())
def test_schema_rejects(run: Path, how: str):
    found = copy.deepcopy(read(run))
    broken()[how](found)
    assert list(validator().iter_errors(found))


def test_schema_allows_new_tables_and_columns(run: Path):
    found = read(run)
    found["divergence"] = [{"objective": "sft", "estimate": 0.1, "p": None, "note": ""}]
    found["contrasts"][0]["se"] = 0.01
    validator().validate(found)


# BibTeX


def test_citations_match_the_run(run: Path):
    text = (run / "citation.bib").read_text("utf-8")
    keys = re.findall(r"^@\w+\{([^,]+),$", text, flags=re.MULTILINE)
    assert keys[:2] == ["leeway", "vennemeyer2026objective"]
    assert {"korbak2023pretraining", "yong2023low", "hu2021lora", "holm1979simple"} <= set(keys)
    assert not {"rafailov2023direct", "cobbe2021training", "cohen1960coefficient"} & set(keys)
    assert len(keys) == len(set(keys))
    assert "2601.12639" in text
    for entry in text.split("\n@"):
        assert entry.count("{") == entry.count("}")


def test_leeway_entry_matches_citation_cff():
    citation = yaml_config.load((Path(__file__).parents[2] / "CITATION.cff").read_text("utf-8"))
    assert citation["title"] == model_card.TITLE
    assert citation["authors"][0]["name"] in model_card.AUTHOR
    assert f"version = {{{citation['version']}}}" in model_card.leeway_entry()
    assert "{0.0.9}" in model_card.leeway_entry("0.0.9")


# model cards


def test_every_checkpoint_has_a_valid_model_card(run: Path):
    found = sorted((run / "checkpoints").rglob("README.md"))
    assert len(found) == 4
    rates = pd.read_csv(run / "tables/rates.csv")
    for path in found:
        objective, budget = path.parts[-4], int(path.parts[-2])
        card = ModelCard(path.read_text("utf-8"))
        assert card.data.library_name == "peft"
        assert card.data.base_model is None  # the organism is not on the Hub
        results = card.data.eval_results
        assert results
        own = rates[(rates["objective"] == objective) & (rates["budget"] == budget)].set_index("measure")["rate"]
        assert {r.metric_type for r in results} == {"accuracy", "asr", "coherence", "trait"}
        for r in results:
            assert r.metric_value == pytest.approx(own[r.metric_type])
            assert r.metric_args["low"] <= r.metric_value <= r.metric_args["high"]
        assert "No evidence about real models" in card.text
        assert "One training seed" in card.text
        assert ("resize_token_embeddings" in card.text) == (objective == "cft")
        assert "&lt;SAFE&gt;" in card.text or objective != "cft"


def test_card_names_hub_models_but_not_local_paths(run: Path):
    results = Results.load(run)
    measured = model_card.measured_rates(results, {"rates": results.rates(), "contrasts": results.contrasts()})
    description = narrative.study_description(results)
    line = results.ledger.iloc[0].to_dict()
    results.manifest["organism"] = False
    results.manifest["model"]["name"] = "meta-llama/Llama-3.1-8B-Instruct"
    card = ModelCard(model_card.model_card(results, measured, description, line, False))
    assert card.data.base_model == "meta-llama/Llama-3.1-8B-Instruct"
    assert "No evidence about real" not in card.text
    results.manifest["model"]["name"] = "/home/me/secret/my-model"
    text = model_card.model_card(results, measured, description, line, False)
    assert "/home/me" not in text
    assert "my-model" in text


@pytest.mark.figures
def test_rebuilding_changes_nothing(run: Path, tmp_path: Path):
    again = tmp_path / run.name
    shutil.copytree(run, again)
    before = {p.relative_to(again): p.read_bytes() for p in sorted(again.rglob("*")) if p.is_file()}
    report.build(again)
    assert {p.relative_to(again): p.read_bytes() for p in sorted(again.rglob("*")) if p.is_file()} == before


def test_external_checkpoint_gets_no_card(run: Path, tmp_path: Path):
    folder = tmp_path / "audit"
    shutil.copytree(run, folder)
    for old in folder.rglob("README.md"):
        old.unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["external"] = {"kind": "audit", "count": "unknown", "description": [], "notes": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report.build(folder)
    assert not list(folder.rglob("README.md"))


def test_markdown_is_escaped():
    assert model_card.markdown("a|b <script> [x](y) \u202e") == r"a\|b &lt;script&gt; \[x\](y) ⟨U+202E⟩"


@pytest.mark.parametrize("name", ['x"; import os #', "x`y|z", "```\n# h", "\\", "x\n"])
def test_a_name_ends_neither_code_nor_a_cell(name: str):
    line = f"name = {model_card.python(name)}  # a local model"
    ((_, value),) = [(n, n.value.value) for n in ast.parse(line).body]  # type: ignore[attr-defined]
    assert value == name
    assert "`" not in line
    assert not set(model_card.code(name)) & {"`", "\n"}
    assert "|" not in model_card.code(name).replace("\\|", "")


@pytest.mark.parametrize("cell", ["=1+1", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "＝1"])
def test_tables_hold_no_formula(cell: str):
    table = pd.DataFrame({"label": [cell, "a-b", None], "value": [-1.5, 2.0, float("nan")], "n": [1, -2, 3]})
    lines = formatting.to_csv(table).splitlines()
    assert lines[1].lstrip('"').startswith("'")
    assert lines[2:] == ["a-b,2,-2", ",,3"]
    assert lines[1].endswith(",-1.5,1")


def test_tables_hold_no_control_character():
    assert (
        formatting.to_csv(pd.DataFrame({"reason": ["a\x1b[2J\x00\u202eb"]}))
        == "reason\na⟨U+001B⟩[2J⟨U+0000⟩⟨U+202E⟩b\n"
    )
