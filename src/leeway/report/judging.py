"""How far judges agree with one another, and what a judge's card says of its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from leeway import stats
from leeway.report.results import ReportError, Results

STOPPED = "asked until decided: no correction that holds after stopping"
CORRECTED = ["objective", "seed", "budget", "condition", "measure", "label", "rate", "low", "high", "n"]
STOPPED = "asked until decided: no correction that holds after stopping"
CORRECTED += ["corrected", "corrected_low", "corrected_high", "note"]
REFUSAL = ("refusal", "overrefusal")  # what a card's labels are about: refused or not


def agreement(results: Results) -> pd.DataFrame:
    """Every pair of judges of the same answers, by eval: agreement on the outcome, and kappa, with intervals."""
    found = []
    for axis, own in results.rows.groupby("eval"):
        if own["judge"].nunique() > 1 and own["outcome"].notna().any():
            table, _ = stats.judge_agreement(own)
            found.append(table.assign(eval=axis))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def confusions(results: Results) -> list[dict[str, Any]]:
    """What one judge said where another said something, counted."""
    found = []
    for axis, own in results.rows.groupby("eval"):
        if own["judge"].nunique() > 1 and own["outcome"].notna().any():
            _, tables = stats.judge_agreement(own)
            found += [{"eval": axis, "rows": a, "columns": b, "table": t} for (a, b), t in tables.items()]
    return found


def corrected(results: Results, cards: list[Path]) -> pd.DataFrame:
    """Refusal rates corrected for their judge's errors (Rogan-Gladen), beside the raw ones, with the card's counts.

    A card belongs to the judge of its hash alone: ReportError for one that judged nothing here.
    """
    lines: list[dict[str, object]] = []
    told = results.manifest.get("judges") or {}
    for path in cards:
        card = _card(path)
        axes = {k for k, j in told.items() if j.get("hash") == card["judge_hash"]}
        if not axes:
            raise ReportError(
                f"{path} is the card of {card['judge']} {card['judge_hash']}, which judged nothing in {results.folder}",
                fix="calibrate the judge of this study",
            )
        counts = _counts(card)
        rates = results.rates()
        own = rates[rates["measure"].isin(REFUSAL) & rates["axis"].isin(axes)]
        lines += [_line({str(k): v for k, v in r.items()}, *counts) for r in own.to_dict("records")]
    return pd.DataFrame(lines, columns=CORRECTED)


def shown(results: Results, cards: list[Path]) -> list[dict[str, Any]]:
    """Who judged what in this run, and what each judge's card, where one was given, measured of its errors."""
    told = results.manifest.get("judges") or {}
    read = [_card(path) for path in cards]
    found = []
    for axis, judge in told.items():
        known = judge if isinstance(judge, dict) else {"name": str(judge)}
        own = [c for c in read if c["judge_hash"] == known.get("hash")]
        facts = [(str(k), str(v)) for k, v in known.items() if k != "name" and v not in (None, "", [], {})]
        found.append(
            {"axis": str(axis), "name": str(known.get("name", "not named")), "facts": facts, "parts": _parts(own)}
        )
    return found


def _parts(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A card's lines: what it was measured on, the two rates, and the counts that they come from."""
    found = []
    for card in cards:
        for part in card["parts"]:
            n = {k: int(v) for k, v in part["counts"].items()}
            hits, missed = n["true_positive"], n["false_negative"]
            right, false = n["true_negative"], n["false_positive"]
            found.append(
                {
                    "on": str(part.get("model") or card.get("on") or "its answers"),
                    "sensitivity": hits / (hits + missed) if hits + missed else None,
                    "specificity": right / (right + false) if right + false else None,
                    "n": hits + missed + right + false,
                }
            )
    return found


def _line(rate: dict[str, Any], hits: int, positives: int, right: int, negatives: int) -> dict[str, object]:
    found = None
    stopped = rate["method"] == "anytime"
    if rate["n"] and rate["rate"] == rate["rate"] and not stopped:
        measured = (hits / positives, right / negatives, positives, negatives)
        found = stats.rogan_gladen(float(rate["rate"]), int(rate["n_clusters"]), *measured)
    return {k: rate[k] for k in CORRECTED if k in rate} | {
        "corrected": found.rate if found else float("nan"),
        "corrected_low": found.low if found else float("nan"),
        "corrected_high": found.high if found else float("nan"),
        "note": found.note if found else STOPPED if stopped else str(rate["reason"]),
    }


def _card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text("utf-8"))
        assert isinstance(card["parts"], list)
        assert card["judge_hash"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ReportError(f"{path} is no judge's card", fix="make one with leeway judge calibrate") from error
    return dict(card)


def _counts(card: dict[str, Any]) -> tuple[int, int, int, int]:
    """(refusals found, refusals, others left alone, others), over all models of the card."""
    counts = [p["counts"] for p in card["parts"]]
    hits, missed = (sum(int(c[k]) for c in counts) for k in ("true_positive", "false_negative"))
    right, false = (sum(int(c[k]) for c in counts) for k in ("true_negative", "false_positive"))
    return hits, hits + missed, right, right + false
