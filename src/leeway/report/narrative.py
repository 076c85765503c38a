"""What the page says about the study itself: what was asked, what was matched, how to run it again.

How far judges agree with one another, and what a judge's card says of its errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from leeway import stats
from leeway.data.ledger import DATA, MATCHED, Matching
from leeway.report import formatting
from leeway.report.results import ReportError, Results
from leeway.stats.metrics import BASE, DIRECT

BY_OBJECTIVE = "by objective"


def asked(results: Results) -> list[tuple[str, str]]:
    """The study in words, as terms and descriptions."""
    study, rows, manifest = results.study, results.rows, results.manifest
    tuned = rows[rows["objective"] != BASE]
    objectives = ordered([str(o) for o in tuned["objective"].unique()], study)
    budgets = sorted(int(b) for b in tuned["budget"].unique())
    if known := external(manifest):
        return [*((str(term), str(words)) for term, words in known.get("description", [])), *_asked_of_all(results)]
    found = [("Model", _model(manifest.get("model"), study.get("model")))]
    found.append(("Task", _task(study.get("task"), manifest.get("data"))))
    found.append(("Objectives", formatting.listed([formatting.name(o) for o in objectives]) or "none"))
    if budgets:
        counted = "processed tokens" if matching(manifest).count == "processed" else "source tokens"
        found.append(("Budgets", ", ".join(formatting.format_budget(b) for b in budgets) + f" {counted}"))
    starts = [f"{formatting.name(o)} from {s}" for o, s in matching(manifest).starts.items()]
    found += [("Starts", "; ".join(starts))] if starts else []
    seeds = ", ".join(map(str, results.seeds))
    found.append(("Training seeds", f"{len(results.seeds)} ({seeds})" if seeds else "none"))
    settings = {"Adapter": study.get("adapter"), "Optimiser": _optimiser(_dict(study.get("optim")))}
    found += [(term, _settings(value)) for term, value in settings.items() if isinstance(value, dict)]
    return [*found, *_asked_of_all(results)]


def external(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a run says that measured a model it did not train; empty for a study."""
    return _dict(manifest.get("external"))


def _asked_of_all(results: Results) -> list[tuple[str, str]]:
    """What every checkpoint was asked, and who judged it."""
    rows, manifest = results.rows, results.manifest
    found = [(axis.capitalize(), _items(rows[rows["eval"] == axis])) for axis in rows["eval"].unique()]
    found += [(f"Judge, {axis}", _judge(judge)) for axis, judge in _dict(manifest.get("judges")).items()]
    if design := results.sequential:
        found.append(("Design", _sequential(design)))
    found.append(("Prompts at test time", formatting.listed(sorted(set(results.conditions.values()))) or "plain"))
    return found


def _sequential(design: dict[str, Any]) -> str:
    """What was asked of a design that stops once all is decided, and what that saved."""
    told = [
        f"{axis} {n['answers']:,} of {n['of_answers']:,} answers, about {n['tokens_saved']:,} new tokens saved"
        for axis, n in _dict(design.get("asked")).items()
    ]
    return (
        f"prompts in one random order, asked until each contrast with the base is decided: different, or within "
        f"±{100 * float(design.get('margin', 0)):g} points ({'; '.join(told)}). Intervals and p of these checkpoints "
        "hold wherever one stops; estimates that resample prompts are not made."
    )


def ordered(objectives: list[str], study: dict[str, Any]) -> list[str]:
    """The study file's order first, what it does not name after that."""
    named = study.get("objectives")
    order: list[str] = []
    for one in named if isinstance(named, list | dict) else []:
        order += [str(alias) for alias in one] if isinstance(one, dict) else [str(one)]
    return [o for o in order if o in objectives] + sorted(set(objectives) - set(order))


def matching(manifest: dict[str, Any]) -> Matching:
    """What had to be equal between which objectives."""
    known = _dict(manifest.get("matching"))
    return Matching(str(known.get("count", "source")), {str(k): str(v) for k, v in _dict(known.get("starts")).items()})


def matched(ledger: pd.DataFrame, rule: Matching) -> tuple[list[str], list[dict[str, Any]]]:
    """Per budget and start the value that all objectives share; BY_OBJECTIVE where it may differ, None where not."""
    columns = [c for c in MATCHED if c in ledger.columns]
    lines = []
    starts = ledger["objective"].map(lambda o: rule.starts.get(str(o), BASE))
    for (seed, budget), group in ledger.groupby(["seed", "budget"], sort=True):
        for start, alike in group.groupby(starts[group.index], sort=False):
            shared: dict[str, Any] = {c: _shared(group[c] if c in DATA else alike[c]) for c in columns}
            if rule.count == "processed":
                shared |= {c: BY_OBJECTIVE for c in columns if c in DATA and shared[c] is None}
            lines.append({"seed": seed, "budget": budget, "start": start, "objectives": len(alike), "shared": shared})
    return columns, lines


def _shared(values: pd.Series[Any]) -> Any:
    return values.iloc[0] if values.nunique(dropna=False) == 1 else None


def cost(ledger: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """What each objective processed at the largest budget beside the source tokens that were matched."""
    if ledger.empty:
        return ledger
    last: pd.DataFrame = ledger[ledger["budget"] == ledger["budget"].max()].copy()
    everything, source = last["processed_tokens"] + last["reference_tokens"], last["source_tokens"]
    last["ratio"] = everything / source.where(source > 0)
    last["place"] = last["objective"].map({o: n for n, o in enumerate(order)})
    return last.sort_values(["place", "seed"]).drop(columns="place")


def provenance(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Versions and hashes, flattened; whatever the manifest holds."""
    found: list[tuple[str, str]] = []
    for key, value in manifest.items():
        if isinstance(value, dict):
            found += [(f"{key}: {k}", _settings(v) if isinstance(v, dict) else str(v)) for k, v in value.items()]
        else:
            found.append((str(key), ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return [(k, formatting.visible(v, 400)[0]) for k, v in found]


def _model(model: object, name: object) -> str:
    known = _dict(model)
    text = str(known.get("name") or name or "not recorded")
    size = known.get("parameters")
    more = [_parameters(size) if isinstance(size, int) else "", str(known.get("dtype") or "")]
    more.append(f"hash {known['hash']}" if known.get("hash") else "")
    details = ", ".join(filter(None, more))
    return f"{text} ({details})" if details else text


def _parameters(size: int) -> str:
    return f"{size / 1e6:,.1f}M parameters" if size >= 1_000_000 else f"{size:,} parameters"


def _task(task: object, data: object) -> str:
    text = str(task.get("name", "not named")) if isinstance(task, dict) else str(task or "not recorded")
    train = _dict(_dict(task).get("files")).get("train")
    text += f" ({train})" if train else ""
    known = _dict(data)
    if isinstance(known.get("examples"), int):
        text += f", {known['examples']:,} training examples"
    left_out = _dict(known.get("left_out")).get("count")
    text += f", {left_out:,} left out of every objective" if isinstance(left_out, int) and left_out else ""
    return text + _pairs(known.get("pairs"))


def _pairs(pairs: object) -> str:
    """The strategy, and where answers were tried the share of them that was accepted."""
    known = _dict(pairs)
    if not known:
        return f", pairs: {pairs}" if pairs else ""
    text = f", pairs: {known.get('strategy')}"
    if known.get("rejected"):
        left_out = _dict(known.get("left_out")).get("count", 0)
        text += f" ({known['accepted']:,} of {known['attempted']:,} answers accepted, {left_out:,} examples left out)"
    return text


def _optimiser(optim: dict[str, Any]) -> dict[str, Any]:
    """The settings that were in use: the sweep's only where rates were tuned."""
    shown = {k: v for k, v in optim.items() if k != "tune" or optim.get("lr") == "tuned"}
    return {k: _settings(v) if isinstance(v, dict) else v for k, v in shown.items()}


def _items(rows: pd.DataFrame) -> str:
    parts = rows["item_id"].str.rsplit("/", n=1).str[0].value_counts().index
    text = f"{rows['item_id'].nunique():,} items ({', '.join(sorted(map(str, parts)))})"
    attacks = [a for a in rows["attack"].dropna().unique() if a]
    if attacks:
        shown = [formatting.attack(str(a)) for a in sorted(attacks, key=lambda a: (a != DIRECT, a))]
        text += f", {formatting.listed(shown)}"
    samples = rows["sample"].nunique()
    return text + (f", {samples} samples each" if samples > 1 else ", one answer each")


def _judge(judge: object) -> str:
    known = _dict(judge)
    if not known:
        return str(judge)
    told = ", ".join(f"{key} {known[key]}" for key in ("version", "hash") if key in known)
    text = f"{known.get('name', 'not named')} ({told})" if told else str(known.get("name"))
    return f"{text}: {known['note']}" if known.get("note") else text


def _settings(value: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items())


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


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
