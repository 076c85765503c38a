"""Compare or pool several studies, and write the result as a page, Markdown, JSON, CSV and forest plots."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leeway.errors import LeewayError
from leeway.io import write_file
from leeway.report import formatting, plotting
from leeway.report.compare.check import Comparable, Study, comparable, items, load
from leeway.report.compare.effects import deltas, differences, effects, meta, pool
from leeway.report.exports.model_card import markdown as safe
from leeway.report.formatting import BudgetUnit, mapping
from leeway.report.plotting import FAINT, INK, WIDTH, Drawing, finish, points_axis, style
from leeway.report.rebuild import column_types
from leeway.report.results import Results
from leeway.report.verdict import LEVEL

FORMAT = 1
OUTPUT = re.compile(r"compare(-[a-z]+)?\.(csv|json|html|md|svg|png|pdf)")


@dataclass(frozen=True)
class StudyComparison:
    """The result of a comparison."""

    kind: str  # `contrasted` or `pooled`
    studies: list[Study]
    checked: Comparable
    tables: dict[str, pd.DataFrame]
    sentences: list[str]
    pooled: Results | None = None

    @property
    def unit(self) -> BudgetUnit:
        return BudgetUnit.of(self.studies[0].results.manifest)

    @property
    def organisms(self) -> list[str]:
        """Names of the studies of the synthetic model."""
        return [s.name for s in self.studies if s.results.manifest.get("organism")]


def compare(folders: Seq[Path], *, pooling: bool = False) -> StudyComparison:
    """Compare studies, or pool runs that differ in training seeds only; raises LeewayError."""
    studies = load(folders)
    if pooling:
        return _pooled(studies)
    checked = comparable(studies)
    own = effects(checked.studies)
    if own.empty:
        raise LeewayError(f"compare: no effect is left to compare{checked.reasons()}", fix="see docs/results.md")
    paired = deltas(checked.studies)
    made = {
        "effects": own,
        "differences": differences(own, paired),
        "meta": meta(own, paired),
        "items": items(checked.studies),
        "settings": pd.DataFrame(checked.differences, columns=["what", "effect", *(s.name for s in studies)]),
    }
    sentences = _sentences(made, BudgetUnit.of(studies[0].results.manifest))
    return StudyComparison("contrasted", studies, checked, made, sentences)


def _pooled(studies: list[Study]) -> StudyComparison:
    pooled = pool(studies)
    everything = pooled.contrasts()
    own = pd.concat([s.results.contrasts().assign(study=s.name) for s in studies], ignore_index=True)
    own = own[own["primary"]]
    made = {"contrasts": everything, "rates": pooled.pooled_rates(), "effects": own[["study", *everything.columns]]}
    seeds = formatting.join_and([str(s) for s in pooled.seeds])
    sentences = [
        f"{len(studies)} runs of one study are pooled: they differ only in training seeds ({seeds}) and have the same "
        "base responses.",
        "95% CIs cover prompt sampling; seed_ci_low and seed_ci_high also cover training-seed variance"
        + (" (wide with two or three seeds)." if len(pooled.seeds) < 4 else "."),
    ]
    return StudyComparison("pooled", studies, Comparable(studies), made, sentences, pooled)


def write(comparison: StudyComparison, out: Path) -> Path:
    """Write `compare.json`, `compare-*.csv`, figures, `compare.md` and `compare.html`; return its path."""
    drawings = draw(comparison)
    contents: dict[str, str | bytes] = {f"compare-{k}.csv": formatting.to_csv(t) for k, t in comparison.tables.items()}
    for d in drawings:
        contents |= {f"{d.name}.svg": d.svg, f"{d.name}.png": d.png, f"{d.name}.pdf": d.pdf}
    contents |= {"compare.json": formatting.to_json(_json(comparison)), "compare.md": markdown(comparison)}
    contents["compare.html"] = page(comparison, drawings)
    for old in sorted(out.glob("compare*")) if out.is_dir() else []:
        if OUTPUT.fullmatch(old.name) and old.name not in contents:
            old.unlink()  # of an earlier comparison
    for name, content in contents.items():
        write_file(out / name, content)
    return out / "compare.html"


def _json(comparison: StudyComparison) -> dict[str, Any]:
    records = {name: formatting.to_records(table) for name, table in comparison.tables.items()}
    head = {"format": FORMAT, "kind": comparison.kind, "level": LEVEL}
    head |= {"studies": [_study(s) for s in comparison.studies], "sentences": comparison.sentences}
    types = {name: column_types(lines, [str(c) for c in comparison.tables[name]]) for name, lines in records.items()}
    return {**head, "columns": types, **records}


def _study(study: Study) -> dict[str, Any]:
    manifest = study.results.manifest
    model, organism = mapping(manifest.get("model")), bool(manifest.get("organism"))
    found: dict[str, Any] = {"name": study.name, "study_hash": manifest.get("study_hash")}
    found |= {"leeway": manifest.get("leeway"), "organism": organism, "model": model.get("name")}
    return found | {"model_hash": model.get("hash"), "seeds": study.results.seeds, "rows": len(study.results.rows)}


def _sentences(made: dict[str, pd.DataFrame], unit: BudgetUnit) -> list[str]:
    """Summarize the meta-analysis and the pairwise differences at the largest shared budget."""
    over, between = made["meta"], made["differences"]
    largest = int(over["budget"].max())
    sentences = []
    for label, own in over[over["budget"] == largest].groupby("label", sort=False):
        known = own[own["p_holm"].notna()]
        significant = known[known["p_holm"] < LEVEL]
        named = ", ".join(
            f"{formatting.objective_name(o, c)} {formatting.points(e)}"
            for o, c, e in significant[["objective", "condition", "estimate"]].itertuples(index=False, name=None)
        )
        of = f"{len(significant) or 'none'} of {len(known)} objectives and test prompts"
        pairs = between[(between["budget"] == largest) & (between["label"] == label)]
        tested, differ = int(pairs["p_holm"].notna().sum()), int((pairs["p_holm"] < LEVEL).sum())
        text = f"{label}, {unit.at(largest)}: the mean over studies differs significantly from the base for {of}"
        text += f" ({named} points)" if named else ""
        sentences.append(f"{text}; significant differences between two studies: {differ} of {tested}.")
    if over["studies"].max() == 2:
        sentences.append(
            "With two studies, between-study variance rests on one difference, and the t interval of the mean has one "
            "degree of freedom: 12.7 standard errors to each side."
        )
    sentences.append("A non-significant difference is no evidence that two studies agree.")
    return sentences


MARKERS = ["o", "s", "D", "^", "v", "P", "X", "h"]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#666666"]
MEAN = "mean over studies"


def draw(comparison: StudyComparison) -> list[Drawing]:
    """Draw one forest plot per primary measure, at the largest shared budget of each objective."""
    own = comparison.tables["effects"]
    if "meta" in comparison.tables:
        over = comparison.tables["meta"]
    else:
        pooled = comparison.tables["contrasts"]
        over = pooled[pooled["primary"]].rename(columns={"difference": "estimate"})
    with style():
        return [
            _forest(comparison, str(m), own[own["measure"] == m], over[over["measure"] == m])
            for m in own["measure"].unique()
        ]


def _forest(comparison: StudyComparison, measure: str, own: pd.DataFrame, over: pd.DataFrame) -> Drawing:
    groups = []
    for (objective, condition), lines in own.groupby(["objective", "condition"], sort=False):
        at = int(lines["budget"].max())
        mean = over[(over["objective"] == objective) & (over["condition"] == condition) & (over["budget"] == at)]
        title = f"{formatting.objective_name(str(objective), str(condition))}, {comparison.unit.tick(at)}"
        groups.append((title, lines[lines["budget"] == at], mean))
    names = [s.name for s in comparison.studies]
    total = sum(len(lines) + len(mean) + 1 for _, lines, mean in groups)
    height = 0.2 * total + 0.95
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.3, right=0.97, top=1 - 0.4 / height, bottom=0.5 / height)
    y, ticks = total, []
    for title, lines, mean in groups:
        ax.annotate(title, (0, y), xytext=(-0.42, y), xycoords=("axes fraction", "data"), weight="bold", va="center")
        for _, line in lines.iterrows():
            y -= 1
            k = names.index(line["study"])
            draw_interval(ax, line, y, "difference", MARKERS[k % len(MARKERS)], COLOURS[k % len(COLOURS)])
            ticks.append((y, short_name(line["study"])))
        for _, line in mean.iterrows():
            y -= 1
            draw_interval(ax, line, y, "estimate", "d", INK, size=8)
            ticks.append((y, MEAN if comparison.kind == "contrasted" else "pooled"))
        y -= 1
    ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
    ax.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(0.2, total + 0.8)
    ax.grid(axis="y", visible=False)
    points_axis(ax)
    ax.set_xlabel("Difference from the base, percentage points")
    label = str(own["label"].iloc[0])
    return finish(
        figure,
        f"compare-{re.sub('[^a-z0-9]+', '-', measure)}",
        label,
        "Effect of each study at the largest shared budget, with "
        + ("their random-effects mean" if comparison.kind == "contrasted" else "the pooled effect")
        + " below. 95% CIs, not adjusted for multiplicity.",
        f"Forest plot of {label}: effects of {formatting.join_and(names)} with intervals, as in the tables.",
    )


def draw_interval(ax: Axes, line: pd.Series, y: int, at: str, mark: str, colour: str, size: float = 5) -> None:
    if math.isnan(line[at]):
        ax.text(0, y, " not available", va="center", fontsize=7.5, color=FAINT)
        return
    ax.plot([max(line["low"], -1), min(line["high"], 1)], [y, y], color=colour, linewidth=1.3, zorder=2)
    ax.plot([line[at]], [y], marker=mark, color=colour, markersize=size, zorder=3)


def short_name(name: str) -> str:
    text = formatting.escape_invisible(name)[0]
    return text if len(text) < 30 else f"{text[:28]}…"


def page(comparison: StudyComparison, drawings: list[Drawing]) -> str:
    """Render the page, self-contained and in the report's style."""
    environment = formatting.templates("leeway.report.compare", ".", html=True, budget=comparison.unit.tick)
    css = files("leeway.report.page").joinpath("styles/page.css").read_text(encoding="utf-8")
    return environment.get_template("compare.html.j2").render(
        style=Markup(plotting.with_line_colours(css)),
        comparison=comparison,
        names=[s.name for s in comparison.studies],
        studies=[(s.name, s.results.manifest, s.results.seeds) for s in comparison.studies],
        drawings=[(d, Markup(d.inline)) for d in drawings],
        tables={k: formatting.to_records(t) for k, t in comparison.tables.items()},
        left_out=comparison.checked.left_out,
        level=LEVEL,
    )


def markdown(comparison: StudyComparison) -> str:
    """Return a summary for a pull request or an issue."""
    names = [s.name for s in comparison.studies]
    lines = [f"# {formatting.join_and([safe(n) for n in names])}, {comparison.kind}", ""]
    if comparison.organisms:
        named = safe(formatting.join_and(comparison.organisms))
        lines += [f"> No evidence about real models: {named} used the organism.", ""]
    lines += [f"- {safe(s)}" for s in comparison.sentences]
    lines += [f"- {safe(d['what'])} {safe(d['effect'])}" for d in comparison.checked.left_out]
    if "meta" in comparison.tables:
        heads = ["Objective", "Budget", "Measure", "Studies", "Mean effect", "I²", "τ", "p (Holm)"]
        records = formatting.to_records(comparison.tables["meta"])
    else:
        heads = ["Objective", "Budget", "Measure", "Seeds", "Effect", "p (Holm)"]
        records = [r for r in formatting.to_records(comparison.tables["contrasts"]) if r["primary"]]
    rows = [f"| {' | '.join(cells)} |" for cells in (heads, *(_cells(r, comparison.unit) for r in records))]
    lines += ["", rows[0], "|" + "---|" * len(heads), *rows[1:]]
    if "meta" in comparison.tables:
        lines += ["", "Effects are checkpoint − base in percentage points, with 95% CIs."]
    return "\n".join(lines) + "\n"


def _cells(r: dict[str, Any], unit: BudgetUnit) -> list[str]:
    """Return one line of the Markdown table: of the mean over studies, or of a pooled contrast."""
    name = safe(formatting.objective_name(r["objective"], r["condition"]))
    cells = [name, unit.tick(r["budget"]), safe(r["label"])]
    if "estimate" in r:
        spread = "–" if r["tau2"] is None else f"{100 * math.sqrt(r['tau2']):.1f}"
        cells += [str(r["studies"]), _effect(r, "estimate"), formatting.percent(r["i2"], 0), spread]
    else:
        cells += [r["seeds"], _effect(r, "difference")]
    return [*cells, formatting.p_value(r["p_holm"])]


def _effect(r: dict[str, Any], at: str) -> str:
    if r[at] is None:
        return f"– ({safe(r['note'])})"
    return f"{formatting.points(r[at])} [{formatting.points(r['low'])}, {formatting.points(r['high'])}]"
