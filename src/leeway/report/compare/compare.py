"""Several studies side by side: what differs, each effect in each, their differences, and each effect over all."""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from leeway.errors import LeewayError
from leeway.report import tables, wording
from leeway.report.compare.check import Comparable, Study, comparable, items, load
from leeway.report.compare.effects import deltas, differences, effects, meta
from leeway.report.compare.pool import pool
from leeway.report.files.machine import column_types
from leeway.report.results import Results
from leeway.report.scale import Scale
from leeway.report.verdict import LEVEL

FORMAT = 1
OWN = re.compile(r"compare(-[a-z]+)?\.(csv|json|html|md|svg|png|pdf)")


@dataclass(frozen=True)
class Comparison:
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


def compare(folders: Seq[Path], *, pooling: bool = False) -> Comparison:
    """Contrast studies one by one, or pool runs that differ in their training seeds alone; raises LeewayError."""
    studies = load(folders)
    if pooling:
        return _pooled(studies)
    checked = comparable(studies)
    own = effects(checked.studies)
    if own.empty:
        told = "; ".join(f"{d['what']} {d['effect']}" for d in checked.left_out)
        raise LeewayError(
            "compare: no effect is left to compare" + (f" ({told})" if told else ""), fix="see docs/compare.md"
        )
    moved = deltas(checked.studies)
    made = {
        "effects": own,
        "differences": differences(own, moved),
        "meta": meta(own, moved),
        "items": items(checked.studies),
        "settings": pd.DataFrame(checked.differences, columns=["what", "effect", *(s.name for s in studies)]),
    }
    return Comparison("contrasted", studies, checked, made, _sentences(made, Scale.of(studies[0].results.manifest)))


def _pooled(studies: list[Study]) -> Comparison:
    found = pool(studies)
    everything = found.contrasts()
    own = pd.concat([s.results.contrasts().assign(study=s.name) for s in studies], ignore_index=True)
    own = own[own["primary"]]
    made = {"contrasts": everything, "rates": found.pooled_rates(), "effects": own[["study", *everything.columns]]}
    seeds = wording.listed([str(s) for s in found.seeds])
    sentences = [
        f"{len(studies)} runs of one study are pooled: they differ in their training seeds alone ({seeds}), and the "
        "base gave the same answers in each.",
        "95% intervals speak of other prompts; those that cover other training runs too stand in low_runs and high_runs"
        + (", and with two or three seeds they are wide." if len(found.seeds) < 4 else "."),
    ]
    return Comparison("pooled", studies, Comparable(studies), made, sentences, found)


def write(found: Comparison, out: Path) -> Path:
    """Write `compare.json`, `compare-*.csv`, figures, `compare.md` and `compare.html`; gives the page's path."""
    from leeway.report.compare.page import draw, markdown, page  # matplotlib takes a second to load

    drawings = draw(found)
    texts: dict[str, str | bytes] = {f"compare-{k}.csv": tables.csv(t) for k, t in found.tables.items()}
    for d in drawings:
        texts |= {f"{d.name}.svg": d.svg, f"{d.name}.png": d.png, f"{d.name}.pdf": d.pdf}
    texts |= {"compare.json": tables.dump(_machine(found)), "compare.md": markdown(found)}
    texts["compare.html"] = page(found, drawings)
    for old in sorted(out.glob("compare*")) if out.is_dir() else []:
        if OWN.fullmatch(old.name) and old.name not in texts:
            old.unlink()  # what an earlier comparison left would look current
    for name, text in texts.items():
        tables.write_atomically(out / name, text)
    return out / "compare.html"


def _machine(found: Comparison) -> dict[str, Any]:
    records = {name: tables.records(table) for name, table in found.tables.items()}
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
            f"{wording.name(o, c)} {wording.points(e)}"
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
