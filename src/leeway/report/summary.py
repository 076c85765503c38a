"""What the page says about the study itself: what was asked, what was matched, how to run it again."""

from __future__ import annotations

from typing import Any

import pandas as pd

from leeway.data.ledger import DATA, MATCHED, Matching
from leeway.report import wording
from leeway.report.results import Results
from leeway.stats.measures import BASE, DIRECT

BY_OBJECTIVE = "by objective"


def asked(results: Results) -> list[tuple[str, str]]:
    """The study in words, as terms and descriptions."""
    study, rows, manifest = results.study, results.rows, results.manifest
    tuned = rows[rows["objective"] != BASE]
    objectives = ordered([str(o) for o in tuned["objective"].unique()], study)
    budgets = sorted(int(b) for b in tuned["budget"].unique())
    if known := elsewhere(manifest):
        return [*((str(term), str(words)) for term, words in known.get("told", [])), *_asked_of_all(results)]
    found = [("Model", _model(manifest.get("model"), study.get("model")))]
    found.append(("Task", _task(study.get("task"), manifest.get("data"))))
    found.append(("Objectives", wording.listed([wording.name(o) for o in objectives]) or "none"))
    if budgets:
        counted = "processed tokens" if matching(manifest).count == "processed" else "source tokens"
        found.append(("Budgets", ", ".join(wording.budget(b) for b in budgets) + f" {counted}"))
    starts = [f"{wording.name(o)} from {s}" for o, s in matching(manifest).starts.items()]
    found += [("Starts", "; ".join(starts))] if starts else []
    seeds = ", ".join(map(str, results.seeds))
    found.append(("Training seeds", f"{len(results.seeds)} ({seeds})" if seeds else "none"))
    settings = {"Adapter": study.get("adapter"), "Optimiser": _optimiser(_dict(study.get("optim")))}
    found += [(term, _settings(value)) for term, value in settings.items() if isinstance(value, dict)]
    return [*found, *_asked_of_all(results)]


def elsewhere(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a run says that measured a model it did not train; empty for a study."""
    return _dict(manifest.get("elsewhere"))


def _asked_of_all(results: Results) -> list[tuple[str, str]]:
    """What every checkpoint was asked, and who judged it."""
    rows, manifest = results.rows, results.manifest
    found = [(axis.capitalize(), _items(rows[rows["eval"] == axis])) for axis in rows["eval"].unique()]
    found += [(f"Judge, {axis}", _judge(judge)) for axis, judge in _dict(manifest.get("judges")).items()]
    if design := results.sequential:
        found.append(("Design", _sequential(design)))
    found.append(("Prompts at test time", wording.listed(sorted(set(results.conditions.values()))) or "plain"))
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
    return [(k, wording.visible(v, 400)[0]) for k, v in found]


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
        shown = [wording.attack(str(a)) for a in sorted(attacks, key=lambda a: (a != DIRECT, a))]
        text += f", {wording.listed(shown)}"
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
