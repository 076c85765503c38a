"""The verdict in three sentences, computed from the contrasts and nothing else.

What a reader who has to choose needs first: a recommendation per budget, what it bought and cost, the caveats.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from leeway.report import formatting
from leeway.report.formatting import TOKENS, Scale
from leeway.report.plotting import Series
from leeway.stats.cluster_tests import MIN_MOVED
from leeway.stats.pareto import TOLERANCE

LEVEL = 0.05
CALLED = {
    "overrefusal": "over-refusal (benign prompts refused)",
    "persona-sd3": "the Short Dark Triad",
    "persona-self": "traits in self-description",
}
COHERENT = 0.85  # below this share of coherent answers ASR is not read as robustness


NAMED = 4  # objectives that a sentence names


def verdict(
    contrasts: pd.DataFrame,
    seeds: list[int],
    scale: Scale = TOKENS,
    *,
    external: bool = False,
    equivalent: pd.DataFrame | None = None,
) -> list[str]:
    """What each axis shows at the largest budget, what is shown not to have moved, and what that does not show."""
    if contrasts.empty:
        return ["Only the base was measured: there is nothing to compare it with."]
    largest = int(contrasts["budget"].max())
    at_largest = contrasts[contrasts["budget"] == largest]
    table = at_largest[at_largest["primary"]]
    direct = (table["measure"] == "asr:none").any()
    asr = "harmful answers to direct requests" if direct else "attack success (mean over attacks)"
    one = "the checkpoint" if external else "the one objective"
    others = [a for a in dict.fromkeys(table["axis"]) if a not in ("capability", "jailbreak", "persona")]
    called = {a: CALLED.get(str(a), str(a)) for a in others}
    first = f"{_upper(scale.at(largest))}, {_axis(table, 'capability', 'capability (accuracy)', one)}"
    second = [_axis(table, "jailbreak", asr, one), _axis(table, "persona", "persona endorsement", one)]
    second += [_axis(table, axis, called[axis], one) for axis in others]
    return [
        f"{first}.",
        f"{_upper('; '.join(second))}{_incoherent(at_largest)}.",
        _limits(table, seeds, external, equivalent),
    ]


def _axis(table: pd.DataFrame, axis: str, called: str, one: str) -> str:
    own = table[table["axis"] == axis]
    tested = own[own["p_holm"].notna() & (own["n_clusters"] >= MIN_MOVED)]
    if own.empty:
        return f"{called} was not measured"
    if tested.empty:
        why = str(own["note"].iloc[0]).removeprefix("one training seed; ")  # the last sentence says that
        return f"{called} could not be compared for any objective ({why})"
    moved = tested[tested["p_holm"] < LEVEL]
    several = "objectives" if (tested.groupby("objective").size() == 1).all() else "objectives and test prompts"
    of = f"{len(moved) or 'none'} of {len(tested)} {several}" if len(tested) > 1 else one
    if len(tested) == 1 and moved.empty:
        return f"{called} does not differ significantly from the base"
    text = f"{called} differs significantly from the base for {of}"
    return text if moved.empty else f"{text} ({_named(moved)} points)"


def _incoherent(table: pd.DataFrame) -> str:
    """What belongs beside ASR: an answer that means nothing harms nobody, and is not robustness."""
    coherence = table[table["measure"] == "coherence"]
    weak = coherence[coherence["rate"] < COHERENT]
    if not weak.empty:
        lines = weak[["objective", "condition", "rate"]].itertuples(index=False, name=None)
        named = ", ".join(f"{formatting.name(o, c)} {formatting.percent(r, 0)}" for o, c, r in lines)
        return f"; few answers to forbidden prompts were coherent ({named}), so that ASR says little there"
    fell = coherence[(coherence["p_holm"] < LEVEL) & (coherence["difference"] < 0)]
    text = f"; coherent answers became rarer ({_named(fell)} points), which lowers ASR without any robustness"
    return "" if fell.empty else text


def _named(moved: pd.DataFrame) -> str:
    ordered = moved.sort_values("difference", key=abs, ascending=False, kind="stable")
    lines = ordered[["objective", "condition", "difference"]].itertuples(index=False, name=None)
    said = [f"{formatting.name(o, c)} {formatting.points(d)}" for o, c, d in lines]
    if len(said) <= NAMED:
        return ", ".join(said)
    return ", ".join(said[: NAMED - 1]) + f", {len(said) - NAMED + 1} more to {said[-1]}"


def _stable(table: pd.DataFrame, equivalent: pd.DataFrame | None) -> str:
    """Which of the differences that are not significant are shown to be small: by test, not by absence of one."""
    open_ones = table[~(table["p_holm"] < LEVEL) & table["p"].notna()]
    if open_ones.empty:
        return ""
    lead = "A difference that is not significant is no evidence of stability"
    if equivalent is None or equivalent.empty:
        return f"{lead} (no equivalence was tested), and "
    keys = ["objective", "budget", "condition", "measure"]
    tested = open_ones.merge(equivalent[[*keys, "equivalent", "margin"]], on=keys)
    shown = tested[tested["equivalent"].astype(bool)]
    margin = f"±{100 * float(equivalent['margin'].max()):g} points"
    if shown.empty:
        return f"{lead}: none of {len(tested)} is shown to lie within {margin} of the base (equivalence tests), and "
    some = f"{len(shown)} {'is' if len(shown) == 1 else 'are'} shown to lie within {margin} of the base"
    rest = "" if len(shown) == len(tested) else "the others show neither a move nor stability; "
    return f"Of {len(tested)} differences that are not significant, {some} (equivalence tests, Holm); {rest}"


def _limits(table: pd.DataFrame, seeds: list[int], external: bool, equivalent: pd.DataFrame | None) -> str:
    text = _stable(table, equivalent)
    if external:
        text += "intervals cover prompt sampling, not training variance (one external checkpoint)"
    elif len(seeds) == 1:
        text += f"with one training seed ({seeds[0]}) the intervals speak of other prompts, not of another run"
    else:
        text += f"the {len(seeds)} training seeds are pooled, so that the intervals speak of other prompts, "
        text += "not of other training runs"
    lost = int(table["p"].isna().sum())
    text = _upper(text)
    return text + (f"; {lost} of {len(table)} contrasts lack the scored pairs to be printed." if lost else ".")


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


NONE = "none"  # the line of `stats.recommend` that says that nothing qualifies
CLOSE = 0.8  # below this share of draws another objective may well be the better one
FEW = 30  # prompts: fewer carry an interval badly


def decisions(
    contrasts: pd.DataFrame,
    rates: pd.DataFrame,
    advice: pd.DataFrame,
    lines: list[Series],
    scale: Scale = TOKENS,
    equivalent: pd.DataFrame | None = None,
) -> list[dict[str, Any]]:
    """One entry per budget: the recommendation in words, and each objective's difference on each primary measure."""
    better = {} if rates.empty else dict(zip(rates["measure"], rates["better"], strict=True))
    same = _same(equivalent)
    table = contrasts[contrasts["primary"]] if len(contrasts) else contrasts
    found = []
    for budget in sorted(int(b) for b in table["budget"].unique()) if len(table) else []:
        own = table[table["budget"] == budget]
        names = list(dict.fromkeys(own["measure"]))
        cells = {(c["objective"], c["condition"], c["measure"]): c for c in own.to_dict("records")}
        found.append(
            {
                "budget": budget,
                "at": _capitalized(scale.at(budget)),
                "advice": _advice(advice, budget, scale),
                "columns": [str(own.loc[own["measure"] == m, "label"].iloc[0]) for m in names],
                "lines": [
                    {
                        "who": s.label,
                        "cells": [_cell(cells.get((s.objective, s.condition, m)), better, same) for m in names],
                    }
                    for s in lines
                    if any((s.objective, s.condition, m) in cells for m in names)
                ],
            }
        )
    return found


def _cell(found: dict[Any, Any] | None, better: dict[Any, str], same: set[tuple[Any, ...]]) -> dict[str, str] | None:
    if found is None or found["difference"] != found["difference"]:
        return None
    way, state = better.get(found["measure"], ""), "open"
    if found["p_holm"] < LEVEL:
        up = "higher" if found["difference"] > 0 else "lower"
        state = "moved" if not way else "better" if way == up else "worse"
    inside = tuple(found[k] for k in ("objective", "budget", "condition", "measure")) in same
    between = f"{formatting.points(found['low'])} to {formatting.points(found['high'])}"
    shown = {"state": "same" if inside and state == "open" else state, "range": between}
    return shown | {
        "difference": formatting.points(found["difference"]),
        "inside": "within the margin" if inside else "",
    }


def _same(equivalent: pd.DataFrame | None) -> set[tuple[Any, ...]]:
    if equivalent is None or equivalent.empty:
        return set()
    shown = equivalent[equivalent["equivalent"].astype(bool)]
    return set(shown[["objective", "budget", "condition", "measure"]].itertuples(index=False, name=None))


def _advice(advice: pd.DataFrame, budget: int, scale: Scale) -> dict[str, Any] | None:
    """The recommendation of `stats.recommend` as a title and sentences, every objective's reasons after them."""
    own = advice[advice["budget"] == budget] if len(advice) else advice
    if own.empty:
        return None
    reasons = [_reason(line) for line in own.to_dict("records") if line["objective"] != NONE]
    best = own[own["recommended"].astype(bool)].iloc[0]
    at = _capitalized(scale.at(budget))
    if best["objective"] == NONE:
        return {"title": f"{at}: none of them", "lines": [f"{_capitalized(str(best['why']))}."], "reasons": reasons}
    name = formatting.name(str(best["objective"]), str(best["condition"]))
    gain = f", {formatting.points(best['gain'])} points against the base" if best["gain"] == best["gain"] else ""
    said = [
        f"The most capable at the point estimate ({formatting.percent(best['capability'])}{gain}) of the objectives "
        f"shown to be no worse than the base by more than {_margins(own)}."
    ]
    others = own[(own["objective"] != best["objective"]) | (own["condition"] != best["condition"])]
    rivals = [
        f"{'nothing' if o['objective'] == NONE else formatting.name(str(o['objective']), str(o['condition']))} "
        f"in {formatting.percent(o['p_best'], 0)}"
        for o in others.sort_values("p_best", ascending=False, kind="stable").to_dict("records")
        if o["p_best"] >= LEVEL
    ]
    more = f"; {', '.join(rivals[:3])}" if rivals else ""
    said.append(f"Best in {formatting.percent(best['p_best'], 0)} of draws of other prompts{more}.")
    if "capability not shown" in str(best["why"]):
        said.insert(
            1, "It is not shown to be more capable than the base: at this budget nothing is shown to be bought."
        )
    if best["p_best"] < CLOSE:
        said.append("A close call: other prompts could have chosen otherwise.")
    return {"title": f"{at}: {name}", "lines": said, "reasons": reasons}


def _margins(own: pd.DataFrame) -> str:
    """The margins of `stats.recommend` on what was measured, in words."""
    by_size: dict[float, list[str]] = {}
    for measure, margin in TOLERANCE.items():
        if own[measure].isna().all():
            continue
        by_size.setdefault(margin, []).append("ASR" if measure == "asr" else measure)
    return " or ".join(
        f"{100 * m:g} points of {' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"
        for m, names in by_size.items()
    )


def _reason(line: dict[Any, Any]) -> dict[str, Any]:
    verdict = "within the margins" if line["within"] else "qualifies, not shown within" if line["qualifies"] else "out"
    said = [part for part in str(line["why"]).split("; ") if part]
    return {
        "who": formatting.name(str(line["objective"]), str(line["condition"])),
        "best": line["p_best"],
        "verdict": verdict,
        "why": said,
    }


def caveats(
    contrasts: pd.DataFrame, unscored: pd.DataFrame, seeds: list[int], scale: Scale = TOKENS, *, external: bool = False
) -> list[str]:
    """What a reader must hold against the numbers, each only where it applies to this run."""
    found = []
    if external:
        found.append("Intervals cover prompt sampling, not training variance (one external checkpoint).")
    elif len(seeds) == 1:
        found.append(
            f"One training seed ({seeds[0]}): the intervals speak of other prompts. Another run of the same study "
            "could come out otherwise, and nothing here says how far."
        )
    elif len(seeds) > 1:
        found.append(
            f"{len(seeds)} training seeds are pooled: how far runs differ is in an interval only where it says so."
        )
    if len(contrasts):
        last = contrasts[contrasts["primary"] & (contrasts["budget"] == contrasts["budget"].max())]
        found += _power(last, scale)
        everything = contrasts[contrasts["budget"] == contrasts["budget"].max()]
        weak = everything[(everything["measure"] == "coherence") & (everything["rate"] < COHERENT)]
        if len(weak):
            who = formatting.listed(
                [formatting.name(o, c) for o, c in zip(weak["objective"], weak["condition"], strict=True)]
            )
            found.append(f"Under attack {who} often answers without sense: a low ASR is no robustness there.")
    lost = unscored[unscored["unscored"] > 0]
    if len(lost):
        parts = lost.groupby("eval").agg(unscored=("unscored", "sum"), answers=("answers", "first"))
        words = [
            f"{formatting.count(p.unscored)} of {formatting.count(p.answers)} in {axis}" for axis, p in parts.iterrows()
        ]
        found.append(f"Answers without a score, in no rate: {formatting.listed(words)}.")
    return found


def _power(last: pd.DataFrame, scale: Scale) -> list[str]:
    """How small a difference this run can see, and what it could not print."""
    found = []
    if "mde" in last.columns and last["mde"].notna().any():
        worst = last.groupby("label", sort=False)["mde"].max().dropna()
        words = [f"{100 * size:.1f} points in {label}" for label, size in worst.items()]
        found.append(f"Too small to be seen reliably (80% power): less than {formatting.listed(words)}.")
    few = last[(last["n_clusters"] < FEW) & last["difference"].notna()]
    if len(few):
        found.append(
            f"As few as {int(few['n_clusters'].min())} prompts stand behind a number: read the interval, not the point."
        )
    withheld = int(last["difference"].isna().sum())
    if withheld:
        where = scale.at(int(last["budget"].max()))
        found.append(f"{withheld} of {len(last)} differences {where} are not printed: too few pairs have a score.")
    return found


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
