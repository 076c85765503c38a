"""Describe a run: its design, what was matched across objectives, its provenance, and its judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from leeway import stats
from leeway.data.ledger import DATA, MATCHED, Matching
from leeway.io import refuse_special
from leeway.report import formatting, judges, learning, mechanism, plotting, triggers
from leeway.report.controls import control_sentences
from leeway.report.formatting import BudgetUnit, mapping
from leeway.report.results import ReportError, Results
from leeway.report.verdict import verdict
from leeway.stats.metrics import AT, BASE, DIRECT

PER_OBJECTIVE = "per objective"
UNCORRECTED = "not corrected: no correction is valid under sequential stopping"
CORRECTED = ["objective", "seed", "budget", "condition", "measure", "label", "rate", "low", "high", "n"]
CORRECTED += ["corrected", "corrected_low", "corrected_high", "note"]
REFUSAL = ("refusal", "overrefusal")  # the measures that a judge card's labels are about


def study_description(results: Results) -> list[tuple[str, str]]:
    """Describe the study as (term, description) pairs."""
    study, rows, manifest = results.study, results.rows, results.manifest
    if info := external(manifest):
        own = [(str(term), str(text)) for term, text in info.get("description", [])]
        return [*own, *_evaluation_description(results)]
    tuned = rows[rows["objective"] != BASE]
    objectives = plotting.order_objectives([str(o) for o in tuned["objective"].unique()], study)
    budgets = sorted(int(b) for b in tuned["budget"].unique())
    terms = [("Model", _model(manifest.get("model"), study.get("model")))]
    terms.append(("Task", _task(study.get("task"), manifest.get("data"))))
    terms.append(("Objectives", formatting.join_and([formatting.objective_name(o) for o in objectives]) or "none"))
    if budgets:
        unit = "processed tokens" if matching_rule(manifest).count == "processed" else "source tokens"
        terms.append(("Budgets", ", ".join(formatting.format_budget(b) for b in budgets) + f" {unit}"))
    starts = [f"{formatting.objective_name(o)} from {s}" for o, s in matching_rule(manifest).starts.items()]
    terms += [("Initial checkpoints", "; ".join(starts))] if starts else []
    seeds = ", ".join(map(str, results.seeds))
    terms.append(("Training seeds", f"{len(results.seeds)} ({seeds})" if seeds else "none"))
    optim = mapping(study.get("optim"))
    used = {k: v for k, v in optim.items() if k != "tune" or optim.get("lr") == "tuned"}
    used = {k: _settings(v) if isinstance(v, dict) else v for k, v in used.items()}
    settings = {"Adapter": study.get("adapter"), "Optimiser": used}
    terms += [(term, _settings(value)) for term, value in settings.items() if isinstance(value, dict)]
    return [*terms, *_evaluation_description(results)]


def verdict_sentences(results: Results, made: dict[str, pd.DataFrame]) -> list[str]:
    """Return the verdict of a report's tables in full (`report.verdict`), and what its controls and probe show."""
    unit, contrasts, learned = BudgetUnit.of(results.manifest), made["contrasts"], made.get("learned")
    return [
        *verdict(
            contrasts,
            results.seeds,
            unit,
            made.get("equivalence"),
            made.get("identity"),
            external=bool(external(results.manifest)),
            learning=learning.sentences(learned, contrasts, results.manifest, unit),
            void=learning.void_arms(learned, contrasts),
            triggers=triggers.sentences(made.get("triggers"), results.manifest, unit),
            judges=judges.sentences(made.get("judge_pairs"), made.get("worst_case"), unit),
        ),
        *control_sentences(results),
        *mechanism.verdict(mechanism.Probe.of(results)),
    ]


def external(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded of a checkpoint that the run did not train; empty for a study."""
    return mapping(manifest.get("external"))


def matching_rule(manifest: dict[str, Any]) -> Matching:
    """Return what had to be equal between which objectives."""
    rule = mapping(manifest.get("matching"))
    starts = {str(k): str(v) for k, v in mapping(rule.get("starts")).items()}
    return Matching(str(rule.get("count", "source")), starts)


def matched_columns(ledger: pd.DataFrame, rule: Matching) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the matched columns, and per seed, budget and initial checkpoint the value that all objectives share.

    A value is PER_OBJECTIVE where it may differ, and None where it differs but must not.
    """
    columns = [c for c in MATCHED if c in ledger.columns]
    lines = []
    starts = ledger["objective"].map(lambda o: rule.starts.get(str(o), BASE))
    for (seed, budget), group in ledger.groupby(["seed", "budget"], sort=True):
        for start, same_start in group.groupby(starts[group.index], sort=False):
            values = {c: (group if c in DATA else same_start)[c] for c in columns}
            shared = {c: v.iloc[0] if v.nunique(dropna=False) == 1 else None for c, v in values.items()}
            if rule.count == "processed":
                shared |= {c: PER_OBJECTIVE for c in columns if c in DATA and shared[c] is None}
            line = {"seed": seed, "budget": budget, "start": start, "objectives": len(same_start)}
            lines.append(line | {"shared": shared})
    return columns, lines


def training_cost(ledger: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Return each objective's ledger line at the largest budget; `ratio` is all processed tokens / source tokens."""
    if ledger.empty:
        return ledger
    last: pd.DataFrame = ledger[ledger["budget"] == ledger["budget"].max()].copy()
    processed, source = last["processed_tokens"] + last["reference_tokens"], last["source_tokens"]
    last["ratio"] = processed / source.where(source > 0)
    last["place"] = last["objective"].map({o: n for n, o in enumerate(order)})
    return last.sort_values(["place", "seed"]).drop(columns="place")


def provenance(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Flatten the manifest to (key, value) texts."""
    lines: list[tuple[str, str]] = []
    for key, value in manifest.items():
        if isinstance(value, dict):
            lines += [(f"{key}: {k}", _settings(v) if isinstance(v, dict) else str(v)) for k, v in value.items()]
        else:
            lines.append((str(key), ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return [(k, formatting.escape_invisible(v, 400)[0]) for k, v in lines]


def _evaluation_description(results: Results) -> list[tuple[str, str]]:
    """Describe the items that every checkpoint answered, the judges and the test-time prompts."""
    rows, manifest = results.rows, results.manifest
    name = formatting.eval_name
    axes = rows["eval"].unique()
    terms = [(formatting.capitalize_first(name(axis)), _items(rows[rows["eval"] == axis])) for axis in axes]
    terms += [(f"Judge, {name(axis)}", _judge(judge)) for axis, judge in mapping(manifest.get("judges")).items()]
    if design := results.sequential:
        used = [
            f"{axis}: {n['answers']:,} of {n['of_answers']:,} responses, about {n['tokens_saved']:,} new tokens saved"
            for axis, n in mapping(design.get("sample_sizes")).items()
        ]
        margin = f"±{100 * float(design.get('margin', 0)):g} points"
        rule = "prompts are drawn in one random order until each contrast with the base is decided (different, or "
        rule += f"within {margin}). Responses used: {'; '.join(used)}. Intervals and p-values are valid at any "
        rule += "stopping time; bootstrap analyses are not available"
        terms.append(("Sequential stopping", rule))
    conditions = formatting.join_and(sorted(set(results.conditions.values()))) or "plain"
    return [*terms, ("Test-time prompts", conditions)]


def _model(model: object, name: object) -> str:
    info = mapping(model)
    text = str(info.get("name") or name or "not recorded")
    size = info.get("parameters")
    details = [str(info.get("dtype") or "")]
    if isinstance(size, int):
        details.insert(0, f"{size / 1e6:,.1f}M parameters" if size >= 1_000_000 else f"{size:,} parameters")
    details.append(f"hash {info['hash']}" if info.get("hash") else "")
    joined = ", ".join(filter(None, details))
    return f"{text} ({joined})" if joined else text


def _task(task: object, data: object) -> str:
    text = str(task.get("name", "unnamed")) if isinstance(task, dict) else str(task or "not recorded")
    train = mapping(mapping(task).get("files")).get("train")
    text += f" ({train})" if train else ""
    info = mapping(data)
    if isinstance(info.get("examples"), int):
        text += f", {info['examples']:,} training examples"
    left_out = mapping(info.get("left_out")).get("count")
    text += f", {left_out:,} excluded for every objective" if isinstance(left_out, int) and left_out else ""
    return text + _pairs(info.get("pairs"))


def _pairs(pairs: object) -> str:
    """Describe how rejected responses were built, with the acceptance rate if responses were sampled."""
    info = mapping(pairs)
    if not info:
        return f", pairs: {pairs}" if pairs else ""
    text = f", pairs: {info.get('strategy')}"
    if info.get("rejected"):
        left_out = mapping(info.get("left_out")).get("count", 0)
        text += f" ({info['accepted']:,} of {info['attempted']:,} responses accepted, {left_out:,} examples excluded)"
    return text


def _items(rows: pd.DataFrame) -> str:
    sources = rows["item_id"].str.rsplit("/", n=1).str[0].value_counts().index
    text = f"{rows['item_id'].nunique():,} items ({', '.join(sorted(map(str, sources)))})"
    attacks = [a for a in rows["attack"].dropna().unique() if a]
    if attacks:
        names = [formatting.attack_name(str(a)) for a in sorted(attacks, key=lambda a: (a != DIRECT, a))]
        text += f", attacks: {formatting.join_and(names)}"
    samples = rows["sample"].nunique()
    return text + (f", {samples} samples each" if samples > 1 else ", one response each")


def _judge(judge: object) -> str:
    info = mapping(judge)
    if not info:
        return str(judge)
    details = ", ".join(f"{key} {info[key]}" for key in ("version", "hash") if key in info)
    text = f"{info.get('name', 'unnamed')} ({details})" if details else str(info.get("name"))
    return f"{text}: {info['note']}" if info.get("note") else text


def _settings(value: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items())


def corrected_rates(results: Results, cards: list[Path]) -> pd.DataFrame:
    """Return refusal rates corrected for judge error (Rogan-Gladen, 1978), with the raw ones.

    A card applies to the judge with its hash only; raises ReportError if that judge scored nothing in this run.
    """
    lines: list[dict[str, object]] = []
    judges = results.manifest.get("judges") or {}
    for path in cards:
        card = _read_card(path)
        axes = {axis for axis, judge in judges.items() if mapping(judge).get("hash") == card["judge_hash"]}
        if not axes:
            what = f"{path} is the card of {card['judge']} {card['judge_hash']}, which scored nothing in"
            raise ReportError(f"{what} {results.folder}", fix="calibrate the judge of this study")
        counts = _counts([part["counts"] for part in card["parts"]])
        rates = results.rates()
        own = rates[rates["measure"].isin(REFUSAL) & rates["axis"].isin(axes)]
        lines += [_correct({str(k): v for k, v in r.items()}, *counts) for r in own.to_dict("records")]
    return pd.DataFrame(lines, columns=CORRECTED)


def judge_summaries(results: Results, cards: list[Path]) -> list[dict[str, Any]]:
    """Return each judge with its role, and from its card, if one was given, sensitivity, specificity and n by part."""
    read, added = [_read_card(path) for path in cards], mapping(results.manifest.get("rescored"))
    summaries: list[dict[str, Any]] = []
    for axis, judge in (results.manifest.get("judges") or {}).items():
        info = judge if isinstance(judge, dict) else {"name": str(judge)}
        own = [(p, c) for c in read if c["judge_hash"] == info.get("hash") for p in c["parts"]]
        parts = []
        for part, card in own:
            hits, positives, right, negatives = _counts([part["counts"]])
            shares = {"sensitivity": hits / positives if positives else None}
            shares |= {"specificity": right / negatives if negatives else None}
            on = str(part.get("model") or card.get("on") or "its responses")
            parts.append({"on": on, **shares, "n": positives + negatives})
        facts = [(str(k), str(v)) for k, v in info.items() if k != "name" and v not in (None, "", [], {})]
        role = "secondary: not in the main rates" if AT in str(axis) else "primary: its verdicts make this page's rates"
        facts.insert(0, ("role", role))
        if entry := mapping(added.get(axis)):
            facts.append(("added after the run", f"{entry.get('added')} by {entry.get('command')}"))
        summary: dict[str, Any] = {"name": str(info.get("name", "unnamed")), "facts": facts, "parts": parts}
        same = next((s for s in summaries if {k: s[k] for k in summary} == summary), None)
        if same:
            same["axis"] += f", {formatting.eval_name(str(axis))}"
        else:
            summaries.append({"axis": formatting.eval_name(str(axis)), **summary})
    return summaries


def _correct(rate: dict[str, Any], hits: int, positives: int, right: int, negatives: int) -> dict[str, object]:
    line, sequential = {k: rate[k] for k in CORRECTED if k in rate}, rate["method"] == "anytime"
    if sequential or not rate["n"] or rate["rate"] != rate["rate"]:
        return line | {"note": UNCORRECTED if sequential else str(rate["reason"])}
    if not (positives and negatives):
        return line | {"note": "not corrected: the card has no labelled refusals, or nothing else"}
    measured = (hits / positives, right / negatives, positives, negatives)
    found = stats.rogan_gladen(float(rate["rate"]), int(rate["n_clusters"]), *measured)
    line |= {"corrected": found.rate, "corrected_low": found.low, "corrected_high": found.high}
    return line | {"note": found.note}


def _read_card(path: Path) -> dict[str, Any]:
    refuse_special(path)
    try:
        card = json.loads(path.read_text("utf-8"))
        if not (isinstance(card["judge_hash"], str) and isinstance(card["judge"], str) and card["parts"]):
            raise ValueError("no judge, or no parts")
        if min(n for part in card["parts"] for n in _counts([part["counts"]])) < 0:
            raise ValueError("a negative count")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ReportError(f"{path} is not a judge card", fix="make one with `leeway judge calibrate`") from error
    return dict(card)


def _counts(counts: list[dict[str, Any]]) -> tuple[int, int, int, int]:
    """Return (true positives, positives, true negatives, negatives), summed; positive is a refusal."""
    hits, missed = (sum(int(c[k]) for c in counts) for k in ("true_positive", "false_negative"))
    right, false = (sum(int(c[k]) for c in counts) for k in ("true_negative", "false_positive"))
    return hits, hits + missed, right, right + false
