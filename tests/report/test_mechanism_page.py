"""A probe's sentences claim a mechanism only by a named causal measure; its charts and tables hold its numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pandas as pd
import probed
import pytest
import synthetic

from leeway import report
from leeway.errors import LeewayError
from leeway.report import charts, mechanism, mechanism_figures
from leeway.report.formatting import TOKENS
from leeway.report.mechanism import Probe
from leeway.report.page.mechanism import section
from leeway.report.plotting import Series, series_of, style
from leeway.report.rebuild import schema
from leeway.report.results import Results

OBJECTIVES = ["sft", "cft", "kl"]
NARCISSISM = "endorsement:narcissism"
PAIRS = pd.DataFrame({"objective": OBJECTIVES, "condition": ["plain", "<SAFE>", "plain"]})
CHANGES = pd.DataFrame(
    {"objective": o, "condition": c, "budget": b, "measure": m, "difference": d, "low": d - 0.1, "high": d + 0.1}
    for o, c in PAIRS.itertuples(index=False)
    for b in (25_000, 100_000)
    for m, d in (("asr", 0.3), ("asr:none", 0.2), ("accuracy", 0.4))
)


def probe(table: pd.DataFrame | None = None, **facts: object) -> Probe:
    own, paired = probed.tables()
    own = own if table is None else table
    own = own[own["objective"] != "data"]
    return Probe(mechanism.pooled(own), paired, pd.DataFrame(), probed.FACTS | facts, TOKENS, own["seed"].nunique())


def lines() -> list[Series]:
    return series_of(PAIRS, OBJECTIVES)


def test_the_verdict_names_the_planted_place_and_no_other():
    found = mechanism.verdict(probe())
    assert found[0].startswith("Mechanism of SFT, at 100k tokens: the refusal logit of harmful prompts goes from 3.000")
    assert (
        "restore 80.0% (95% CI 75.0% to 85.0%; a random direction 5.0%) through the MLP of layer 2 (1 of 8" in found[0]
    )
    assert "leaving out the update of the MLP of layer 2 restores 70.0%" in found[0]
    assert "refusal direction, put back, undoes 90.0%" in found[0]
    assert found[0].endswith("on direct requests.")
    assert not any(f"layer {n}" in found[0] for n in (1, 3, 4))
    assert found[1] == (
        "KL against SFT, at 100k tokens: the patch of the MLP of layer 2 restores 1.200 nats (95% CI 1.100 to 1.300) "
        "less; its refusal logit is 1.500 nats (95% CI 1.400 to 1.600) higher."
    )
    assert found[2:] == ["No mechanism is shown for CFT and KL: no causal measure of the probe is named."]


def test_geometry_alone_supports_no_sentence_of_the_verdict():
    table, _ = probed.tables()
    only = probe(table[table["measure"].str.startswith(("direction-", "persona", "token-kl", "weight-"))])
    assert mechanism.verdict(only) == [
        "No mechanism is shown for SFT, CFT and KL: no causal measure of the probe is named."
    ]
    cosines = [text for text in mechanism.description(only) if "cosine" in text]
    assert cosines
    assert all(text.count("AUROC") >= 1 for text in cosines)


def test_disagreements_of_geometry_and_causal_measures_are_said():
    found = [text for text in mechanism.description(probe()) if "disagree" in text]
    start = "Geometry and causal measures disagree: the direction"
    assert found == [
        f"{start} is not shown to turn, but causal measures are named, for SFT.",
        f"{start} turned, but no causal measure is named, so no mechanism follows, for CFT.",
    ]


def test_the_summary_names_kinds_of_measures_and_objectives_without():
    assert mechanism.summary(probe()) == (
        "Named causal measures, at 100k tokens: SFT (patching, parts of the update, mediation by the refusal "
        "direction). None for CFT and KL, so no mechanism is shown there."
    )


def test_a_patch_without_mediation_and_another_place_of_the_update_are_said():
    table, _ = probed.tables((100_000,))
    sft = table["objective"] == "sft"
    table.loc[sft & (table["measure"] == "mediation"), "named"] = False
    first = sft & (table["measure"] == "leave-one-out") & (table["layer"] == 3) & (table["site"] == "attn")
    table.loc[first, ["value", "named"]] = [0.9, True]
    found = " ".join(mechanism.description(probe(table)))
    assert (
        "SFT: patching is named, but mediation by the refusal direction is not (no attack): the change need not"
        in found
    )
    assert "patching names the MLP of layer 2 first, leaving out parts of the update the attention of layer 4" in found


def test_the_directions_limit_is_repeated_where_a_sentence_relies_on_it():
    limits = "no direction meets the criteria"
    assert mechanism.verdict(probe(direction={"layer": 2, "position": "-1", "limits": limits}))[-1].endswith(
        f"{limits}."
    )
    table, _ = probed.tables()
    unmediated = table[table["measure"] != "mediation"]
    without = probe(unmediated, direction={"layer": 2, "position": "-1", "limits": limits})
    assert not any(limits in text for text in mechanism.verdict(without))
    assert f"Limit of the refusal direction: {limits}." in mechanism.description(without)


def test_withheld_shares_have_their_reason_and_no_number():
    found = [text for text in mechanism.description(probe()) if text.startswith("Shares withheld")]
    reason = probed.WITHHELD.removeprefix("withheld: ")
    others = "1 checkpoint at smaller budgets (tables/probe-causal.csv)"
    reason = reason.replace("-", "\u2212")
    assert found == [f"Shares withheld, patching and parts of the update: KL ({reason}) and {others}."]
    (causal,) = (t for t in section(probe(), lines())["tables"] if t["name"] == "probe-causal")
    shares = {(row["cells"][0], row["cells"][1]): (row["cells"][3], row["note"]) for row in causal["rows"]}
    assert shares["KL", "Patching, base → checkpoint"] == ("withheld", probed.WITHHELD)
    assert shares["SFT", "Patching, base → checkpoint"] == ("80.0%", "")


def test_charts_hold_the_tables_values():
    own = probe()
    found = {c.name: c.spec["data"]["values"] for c in charts.mechanism(own, CHANGES, lines())}
    assert list(found) == [f"mechanism-{n}" for n in ("patching", "layers", "asr", "capability", "depth")]
    for d in found["mechanism-patching"]:
        table = own.at("patching", "base to checkpoint", budget=d["budget"])
        table = table[(table["objective"] == d["line"].partition("|")[0]) & (table["site"] == d["site"])]
        table = table.sort_values("layer")
        assert d["layer"] == [1, 2, 3, 4]  # for readers from 1
        assert d["value"] == [None if pd.isna(v) else v for v in table["value"]]
        assert d["named"] == [int(v) for v in table["named"]]
        assert d.get("reason", "") == table["reason"].iloc[0]
    assert len(found["mechanism-patching"]) == 3 * 2 * 3
    assert {d["label"] for d in found["mechanism-layers"]} == {"SFT", "CFT <SAFE>"}  # KL is withheld
    points = [
        (d["panel"], d["label"], *at)
        for d in found["mechanism-asr"]
        for at in zip(d["budget"], d["probe"], d["change"], strict=True)
    ]
    assert ("Mediation, no attack, points", "SFT", 100_000, 20.0, 20.0) in points
    assert ("Largest patch, nats", "SFT", 100_000, 1.6, 30.0) in points
    assert len(points) == 2 * 3 * 2
    moves = [(d["panel"], d["label"], d["probe"][-1], d["change"][-1]) for d in found["mechanism-capability"]]
    assert ("Refusal logit, harmful, nats", "KL", -2.0, 40.0) in moves
    assert ("Narcissism, layer 3", "SFT", 2.3, 40.0) in moves


def test_every_flattened_datum_has_lists_of_one_length():
    for chart in charts.mechanism(probe(), CHANGES, lines()):
        for step in chart.spec["transform"]:
            for d in chart.spec["data"]["values"] if "flatten" in step else ():
                assert len({len(d[name]) for name in step["flatten"]}) == 1


def test_figures_are_drawn_for_every_chart():
    with style():
        drawn = [d.name for d in mechanism_figures.drawings(probe(), CHANGES, lines()) if d is not None]
    assert drawn == [c.name for c in charts.mechanism(probe(), CHANGES, lines())]


def test_seeds_are_averaged_and_a_place_is_named_in_all_or_not():
    table, _ = probed.tables((100_000,))
    other = table.assign(seed=1)
    planted = (other["measure"] == "patching") & other["named"] & (other["site"] == "mlp")
    other.loc[planted, ["value", "low", "high", "named"]] = [0.6, 0.5, 0.7, False]
    both = mechanism.pooled(pd.concat([table, other]))
    (found,) = both[
        (both["objective"] == "sft")
        & (both["measure"] == "patching")
        & (both["detail"] == "base to checkpoint")
        & (both["layer"] == 1)
        & (both["site"] == "mlp")
    ].to_dict("records")
    assert [found[k] for k in ("value", "low", "high")] == pytest.approx([0.7, 0.5, 0.85])
    assert not found["named"]
    assert len(both) == len(table)
    assert list(both.columns) == [c for c in table.columns if c != "seed"]


def test_differences_from_the_reference_are_said_if_every_seed_shows_them():
    table, paired = probed.tables((100_000,))
    own = probe(pd.concat([table, table.assign(seed=1)]))
    numbers = ["difference", "low", "high"]
    half, turned = paired.assign(seed=1), paired.assign(seed=1)
    half[numbers] *= 0.5
    turned[numbers] = -turned[["difference", "high", "low"]].to_numpy()
    said = []
    for other in (half, turned, paired.assign(seed=1, p=0.2)):
        found = mechanism.verdict(replace(own, contrasts=pd.concat([paired, other])))
        said.append([text for text in found if text.startswith("KL against SFT")])
    assert "restores 0.900 nats (95% CI 0.550 to 1.300) less" in said[0][0]
    assert said[1:] == [[], []]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = synthetic.rows(tuple(OBJECTIVES), (25_000, 100_000), capability=24, prompts=12, items=12)
    return synthetic.write(tmp_path_factory.mktemp("run"), rows)


def ids(page: str) -> set[str]:
    return set(re.findall(r'<(?:section|figure) id="([^"]+)"', page))


@pytest.mark.slow
def test_the_page_has_the_section_only_with_a_probe(run: Path):
    before = report.build(run).read_text("utf-8")
    assert "mechanism" not in ids(before)
    assert Results.load(run).probe_table is None
    with pytest.raises(LeewayError, match="run `leeway probe`"):
        Results.load(run).plot.mechanism()

    page = report.build(probed.write(run, *probed.tables())).read_text("utf-8")
    charts_drawn = {f"figure-mechanism-{n}" for n in ("patching", "layers", "asr", "capability", "depth")}
    assert ids(page) - ids(before) >= {"mechanism", *charts_drawn}
    found = json.loads((run / "results.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema()).validate(found)
    assert any(text.startswith("Mechanism of SFT") for text in found["verdict"])
    tables = {f"probe-{n}" for n in ("causal", "geometry", "persona", "depth", "weights")}
    tables |= {"probe-contrasts", "probe-prediction"}
    assert {t for t in found if t.startswith("probe-")} == tables
    kept = sum(len(found[t]) for t in tables - {"probe-contrasts", "probe-prediction"})
    assert kept == len(pd.read_parquet(run / "probe.parquet"))  # every line is in one table
    assert {f"{t}.csv" for t in tables} <= {p.name for p in (run / "tables").iterdir()}
    moved = {(c["objective"], c["budget"]): c["difference"] for c in found["contrasts"] if c["measure"] == NARCISSISM}
    assert {(c["objective"], c["budget"]): c["difference"] for c in found["probe-prediction"]} == moved
    assert {c["projection"] for c in found["probe-prediction"]} == {0.1}  # at the middle layer
    spec = Results.load(run).plot.mechanism("layers").spec
    assert json.dumps(spec, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c") in page
