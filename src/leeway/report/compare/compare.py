"""Several studies side by side: what differs, each effect in each, their differences, and each effect over all.

The comparison as a page, as Markdown, and as one forest plot per measure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from leeway.errors import LeewayError
from leeway.io import write_file
from leeway.report import formatting, plotting
from leeway.report.compare.check import Comparable, Study, comparable, items, load
from leeway.report.compare.effects import deltas, differences, effects, meta, pool
from leeway.report.exports.model_card import markdown as safe
from leeway.report.exports.results_json import column_types
from leeway.report.formatting import Scale
from leeway.report.plotting import FAINT, INK, WIDTH, Drawing, finish, style
from leeway.report.results import Results
from leeway.report.verdict import LEVEL

FORMAT = 1
OWN = re.compile(r"compare(-[a-z]+)?\.(csv|json|html|md|svg|png|pdf)")


@dataclass(frozen=True)
class StudyComparison:
    """All that a comparison found."""

    kind: str  # contrasted, pooled
    studies: list[Study]
    checked: Comparable
    tables: dict[str, pd.DataFrame]
    sentences: list[str]
    pooled: Results | None = None

    @property
    def scale(self) -> Scale:
        return Scale.of(self.studies[0].results.manifest)

    @property
    def organisms(self) -> list[str]:
        """The studies whose subject is no real model."""
        return [s.name for s in self.studies if s.results.manifest.get("organism")]


def compare(folders: Seq[Path], *, pooling: bool = False) -> StudyComparison:
    """Contrast studies one by one, or pool runs that differ in their training seeds alone; raises LeewayError."""
    studies = load(folders)
    if pooling:
        return _pooled(studies)
    checked = comparable(studies)
    own = effects(checked.studies)
    if own.empty:
        told = "; ".join(f"{d['what']} {d['effect']}" for d in checked.left_out)
        raise LeewayError(
            "compare: no effect is left to compare" + (f" ({told})" if told else ""), fix="see docs/results.md"
        )
    moved = deltas(checked.studies)
    made = {
        "effects": own,
        "differences": differences(own, moved),
        "meta": meta(own, moved),
        "items": items(checked.studies),
        "settings": pd.DataFrame(checked.differences, columns=["what", "effect", *(s.name for s in studies)]),
    }
    return StudyComparison(
        "contrasted", studies, checked, made, _sentences(made, Scale.of(studies[0].results.manifest))
    )


def _pooled(studies: list[Study]) -> StudyComparison:
    found = pool(studies)
    everything = found.contrasts()
    own = pd.concat([s.results.contrasts().assign(study=s.name) for s in studies], ignore_index=True)
    own = own[own["primary"]]
    made = {"contrasts": everything, "rates": found.pooled_rates(), "effects": own[["study", *everything.columns]]}
    seeds = formatting.listed([str(s) for s in found.seeds])
    sentences = [
        f"{len(studies)} runs of one study are pooled: they differ in their training seeds alone ({seeds}), and the "
        "base gave the same answers in each.",
        "95% intervals cover prompt sampling; seed_ci_low and seed_ci_high cover training seeds too"
        + (", and with two or three seeds they are wide." if len(found.seeds) < 4 else "."),
    ]
    return StudyComparison("pooled", studies, Comparable(studies), made, sentences, found)


def write(found: StudyComparison, out: Path) -> Path:
    """Write `compare.json`, `compare-*.csv`, figures, `compare.md` and `compare.html`; gives the page's path."""
    pass  # matplotlib takes a second to load

    drawings = draw(found)
    texts: dict[str, str | bytes] = {f"compare-{k}.csv": formatting.csv(t) for k, t in found.tables.items()}
    for d in drawings:
        texts |= {f"{d.name}.svg": d.svg, f"{d.name}.png": d.png, f"{d.name}.pdf": d.pdf}
    texts |= {"compare.json": formatting.dump(_machine(found)), "compare.md": markdown(found)}
    texts["compare.html"] = page(found, drawings)
    for old in sorted(out.glob("compare*")) if out.is_dir() else []:
        if OWN.fullmatch(old.name) and old.name not in texts:
            old.unlink()  # what an earlier comparison left would look current
    for name, text in texts.items():
        write_file(out / name, text)
    return out / "compare.html"


def _machine(found: StudyComparison) -> dict[str, Any]:
    records = {name: formatting.records(table) for name, table in found.tables.items()}
    told = [_told(s) for s in found.studies]
    head = {"format": FORMAT, "kind": found.kind, "level": LEVEL, "studies": told, "sentences": found.sentences}
    types = {name: column_types(lines, [str(c) for c in found.tables[name]]) for name, lines in records.items()}
    return {**head, "columns": types, **records}


def _told(study: Study) -> dict[str, Any]:
    manifest = study.results.manifest
    model = manifest.get("model")
    known = model if isinstance(model, dict) else {}
    return {
        "name": study.name,
        "study_hash": manifest.get("study_hash"),
        "leeway": manifest.get("leeway"),
        "organism": bool(manifest.get("organism")),
        "model": known.get("name"),
        "model_hash": known.get("hash"),
        "seeds": study.results.seeds,
        "rows": len(study.results.rows),
    }


def _sentences(made: dict[str, pd.DataFrame], scale: Scale) -> list[str]:
    """What the studies say together at the largest budget that they share, and what they cannot."""
    over, between = made["meta"], made["differences"]
    largest = int(over["budget"].max())
    found = []
    for label, own in over[over["budget"] == largest].groupby("label", sort=False):
        known = own[own["p_holm"].notna()]
        moved = known[known["p_holm"] < LEVEL]
        named = ", ".join(
            f"{formatting.name(o, c)} {formatting.points(e)}"
            for o, c, e in moved[["objective", "condition", "estimate"]].itertuples(index=False, name=None)
        )
        of = f"{len(moved) or 'none'} of {len(known)} objectives and test prompts"
        apart = between[(between["budget"] == largest) & (between["label"] == label)]
        tested, differ = int(apart["p_holm"].notna().sum()), int((apart["p_holm"] < LEVEL).sum())
        text = f"{label}, {scale.at(largest)}: the mean over studies differs from the base for {of}"
        text += f" ({named} points)" if named else ""
        found.append(f"{text}; of {tested} differences between two studies {differ or 'none'} are significant.")
    few = int(over["studies"].max())
    if few == 2:
        found.append(
            "Two studies cannot say how far a third would differ: the spread between studies rests on one difference, "
            "and the interval of the mean takes t with one degree of freedom, 12.7 standard errors to each side."
        )
    found.append("A difference that is not significant is no evidence that two studies agree.")
    return found


MARKS = ["o", "s", "D", "^", "v", "P", "X", "h"]
SHADES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#666666"]
MEAN = "mean over studies"
STYLES = "styles/page.css"


def draw(found: StudyComparison) -> list[Drawing]:
    """One forest plot per primary measure, at the largest budget of each objective."""
    own = found.tables["effects"]
    over = found.tables["meta"] if "meta" in found.tables else _primary_contrasts(found)
    with style():
        return [
            _forest(found, str(m), own[own["measure"] == m], over[over["measure"] == m])
            for m in own["measure"].unique()
        ]


def _primary_contrasts(found: StudyComparison) -> pd.DataFrame:
    table = found.tables["contrasts"]
    return table[table["primary"]].rename(columns={"difference": "estimate"})


def _forest(found: StudyComparison, measure: str, own: pd.DataFrame, over: pd.DataFrame) -> Drawing:
    keys = ["objective", "condition"]
    groups = []
    for (objective, condition), lines in own.groupby(keys, sort=False):
        at = int(lines["budget"].max())
        mean = over[(over["objective"] == objective) & (over["condition"] == condition) & (over["budget"] == at)]
        groups.append(
            (
                f"{formatting.name(str(objective), str(condition))}, {found.scale.tick(at)}",
                lines[lines["budget"] == at],
                mean,
            )
        )
    names = [s.name for s in found.studies]
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
            _point(ax, line, y, "difference", MARKS[k % len(MARKS)], SHADES[k % len(SHADES)])
            ticks.append((y, _short(line["study"])))
        for _, line in mean.iterrows():
            y -= 1
            _point(ax, line, y, "estimate", "d", INK, size=8)
            ticks.append((y, MEAN if found.kind == "contrasted" else "pooled"))
        y -= 1
    ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
    ax.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(0.2, total + 0.8)
    ax.grid(axis="y", visible=False)
    left, right = ax.get_xlim()
    digits = 0 if right - left > 0.04 else 1 if right - left > 0.004 else 2 if right - left > 0.0004 else 3
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: formatting.points(v, digits)))
    ax.set_xlabel("Difference from the base, percentage points")
    label = str(own["label"].iloc[0])
    return finish(
        figure,
        f"compare-{re.sub('[^a-z0-9]+', '-', measure)}",
        label,
        "Each study’s own effect at the largest budget that it shares with another, and below it "
        + ("their random-effects mean" if found.kind == "contrasted" else "the pooled rows’ effect")
        + ", all with 95% intervals for one effect by itself.",
        f"Forest plot of {label}: effects of {formatting.listed(names)} with intervals, as in the tables.",
    )


def _point(ax: Axes, line: pd.Series, y: int, at: str, mark: str, colour: str, size: float = 5) -> None:
    if math.isnan(line[at]):
        ax.text(0, y, " no number", va="center", fontsize=7.5, color=FAINT)
        return
    ax.plot([max(line["low"], -1), min(line["high"], 1)], [y, y], color=colour, linewidth=1.3, zorder=2)
    ax.plot([line[at]], [y], marker=mark, color=colour, markersize=size, zorder=3)


def _short(name: str) -> str:
    text = formatting.visible(name)[0]
    return text if len(text) < 30 else f"{text[:28]}…"


def page(found: StudyComparison, drawings: list[Drawing]) -> str:
    """One file that works offline, in the report's style."""
    environment = Environment(
        loader=PackageLoader("leeway.report.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for words in (formatting.name, formatting.percent, formatting.points, formatting.count):
        environment.filters[words.__name__] = words
    environment.filters |= {"p": formatting.p_value, "budget": found.scale.tick}
    return environment.get_template("compare.html.j2").render(context(found, drawings))


def context(found: StudyComparison, drawings: list[Drawing]) -> dict[str, Any]:
    """What the page's template is filled with."""
    css = files("leeway.report.page").joinpath(STYLES).read_text(encoding="utf-8")
    for place, dark in (("/* lines, light */", False), ("/* lines, dark */", True)):
        css = css.replace(place, plotting.colours(dark=dark))
    return {
        "style": Markup(css),
        "found": found,
        "names": [s.name for s in found.studies],
        "told": [(s.name, s.results.manifest, s.results.seeds) for s in found.studies],
        "drawings": [(d, Markup(d.inline)) for d in drawings],
        "tables": {k: formatting.records(t) for k, t in found.tables.items()},
        "left_out": found.checked.left_out,
        "level": LEVEL,
    }


def markdown(found: StudyComparison) -> str:
    """A summary for a pull request or an issue."""
    names = [s.name for s in found.studies]
    lines = [f"# {formatting.listed([safe(n) for n in names])}, {found.kind}", ""]
    if found.organisms:
        lines += [
            f"> No evidence about real models: {safe(formatting.listed(found.organisms))} measured the organism.",
            "",
        ]
    lines += [f"- {safe(s)}" for s in found.sentences]
    lines += [f"- {safe(d['what'])} {safe(d['effect'])}" for d in found.checked.left_out]
    if "meta" in found.tables:
        lines += [
            "",
            "| Objective | Budget | Measure | Studies | Mean effect | I² | τ | p, Holm |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_mean_line(r, found) for r in formatting.records(found.tables["meta"])]
        lines += ["", "Effects are checkpoint − base in percentage points, with 95% intervals."]
    else:
        lines += ["", "| Objective | Budget | Measure | Seeds | Effect | p, Holm |", "|---|---|---|---|---|---|"]
        for r in formatting.records(found.tables["contrasts"]):
            if r["primary"]:
                cells = [
                    safe(formatting.name(r["objective"], r["condition"])),
                    found.scale.tick(r["budget"]),
                    safe(r["label"]),
                ]
                cells += [r["seeds"], _effect(r, "difference"), formatting.p_value(r["p_holm"])]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_line(r: dict[str, Any], found: StudyComparison) -> str:
    cells = [safe(formatting.name(r["objective"], r["condition"])), found.scale.tick(r["budget"]), safe(r["label"])]
    spread = "–" if r["tau2"] is None else f"{100 * math.sqrt(r['tau2']):.1f}"
    cells += [
        str(r["studies"]),
        _effect(r, "estimate"),
        formatting.percent(r["i2"], 0),
        spread,
        formatting.p_value(r["p_holm"]),
    ]
    return f"| {' | '.join(cells)} |"


def _effect(r: dict[str, Any], at: str) -> str:
    if r[at] is None:
        return f"– ({safe(r['note'])})"
    return f"{formatting.points(r[at])} [{formatting.points(r['low'])}, {formatting.points(r['high'])}]"
