"""Write a model card per checkpoint, in the Hub's format, and the BibTeX entries of what a run used."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Template

from leeway.report import formatting, narrative
from leeway.report.formatting import MISSING, mapping
from leeway.report.results import Results
from leeway.report.verdict import COHERENT, LEVEL, headline
from leeway.stats.metrics import BASE, PLAIN
from leeway.yaml_config import package_data

CARD, LEDGER = "README.md", "ledger.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name; another `model` is a local path
TRAINED_ON = {"gsm8k": "openai/gsm8k", "supergpqa": "m-a-p/SuperGPQA"}
SETTINGS = ("optimiser", "warmup", "schedule", "gradient_clipping", "weight_decay", "examples_per_step")
COUNTS = ("source_tokens", "target_tokens", "processed_tokens", "reference_tokens", "examples", "epochs", "step")

TITLE = "Leeway: how far fine-tuning pushes a chat model off course"  # as in CITATION.cff
AUTHOR = "{The Leeway developers}"
ALWAYS = "always"
PUBLISHED = ("strongreject", "jailbreakbench", "xstest", "anthropic", "gsm8k", "supergpqa", "rule-qa", "lawbench")


def model_cards(results: Results, made: dict[str, pd.DataFrame]) -> dict[Path, str]:
    """Return the text of each card by path; empty for an external checkpoint."""
    if narrative.external(results.manifest):
        return {}
    cards, measured, description = {}, measured_rates(results, made), narrative.study_description(results)
    for line in formatting.to_records(results.ledger):
        folder = results.folder / "checkpoints" / line["objective"] / f"s{line['seed']}" / str(line["budget"])
        if (folder / LEDGER).is_file():
            own_tokenizer = (folder / "tokenizer.json").is_file()
            cards[folder / CARD] = model_card(results, measured, description, line, own_tokenizer)
    return cards


def measured_rates(results: Results, made: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Return the checkpoints' rates of the verdict, and coherence, each with the base's and the contrast."""
    rates = made["rates"]
    reported = rates[headline(rates, rates) | (rates["measure"] == "coherence")]
    reported = reported.sort_values("condition", key=lambda c: c != PLAIN, kind="stable")
    base = reported[reported["objective"] == BASE].drop_duplicates(["condition", "measure"])
    bases = {(r["condition"], r["measure"]): r for r in formatting.to_records(base)}
    keys = ("objective", "budget", "condition", "measure")
    contrasts = {tuple(c[k] for k in keys): c for c in formatting.to_records(made["contrasts"])}
    items = {}
    for axis, rows in results.rows.groupby("eval"):
        names = sorted({str(n) for n in rows["item_id"].str.rsplit("/", n=1).str[0].unique()})
        items[axis] = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return [
        r
        | {"base": bases.get((r["condition"], r["measure"])), "contrast": contrasts.get(tuple(r[k] for k in keys))}
        | {"items": items.get(r["axis"], r["axis"])}
        for r in formatting.to_records(reported[reported["objective"] != BASE])
    ]


@cache
def _template() -> Template:
    filters = {"md": markdown, "code": code, "python": python}
    return formatting.templates("leeway.report.exports", ".", html=False, **filters).get_template("card.md.j2")


def model_card(
    results: Results,
    measured: list[dict[str, Any]],
    description: list[tuple[str, str]],
    line: dict[str, Any],
    own_tokenizer: bool,
    *,
    whole_study: bool = False,
) -> str:
    """Return one checkpoint's card: front matter by huggingface_hub, body by `card.md.j2`.

    With `whole_study` the card has the rates of every checkpoint of the study too.
    """
    study_rates = _study_rates(results, measured, line) if whole_study else None
    measured = [m for m in measured if all(m[k] == line[k] for k in ("objective", "seed", "budget"))]
    manifest, study = results.manifest, results.study
    objective = mapping(mapping(manifest.get("objectives")).get(line["objective"]))
    low_rank = mapping(study.get("adapter")).get("kind", "lora") != "full"
    body = _template().render(
        title=_title(results, line),
        line=line,
        counts=[(k.replace("_", " ").capitalize(), _count(line[k])) for k in COUNTS],
        hashes=[(k, line[k]) for k in line if k.endswith("_hash")],
        kind=formatting.objective_name(str(objective.get("kind", line["objective"]))),
        settings={k: v for k, v in objective.items() if k != "kind"},
        name=str(study.get("name") or results.folder.resolve().name),
        manifest=manifest,
        base=base_name(results),
        revision=mapping(manifest.get("model")).get("revision"),
        organism=bool(manifest.get("organism")),
        description=[(t, text) for t, text in description if t in ("Task", "Adapter")],
        optimiser=[(k, v) for k, v in mapping(manifest.get("optimisation")).items() if k in SETTINGS],
        low_rank=low_rank,
        own_tokenizer=own_tokenizer,
        measured=measured,
        study_rates=study_rates,
        limitations=_limitations(results, description, measured),
        level=LEVEL,
        seeds=results.seeds,
        bib=leeway_entry(str(manifest["leeway"]) if manifest.get("leeway") else None).rstrip(),
    )
    return f"---\n{_front_matter(results, line, measured, low_rank)}\n---\n\n{body}"


def _study_rates(
    results: Results, measured: list[dict[str, Any]], own: dict[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: base and every checkpoint in its objective's own form; this card's is in bold."""
    first = results.first_conditions
    shown = [m for m in measured if m["condition"] == first.get(m["objective"], m["condition"])]
    labels = dict.fromkeys((m["measure"], m["label"]) for m in shown)
    cells: dict[tuple[str, int, int], dict[str, str]] = {}
    for m in shown:
        for who, rate in (((BASE, 0, 0), m["base"]), ((m["objective"], m["budget"], m["seed"]), m)):
            if rate is not None and (who[0] != BASE or m["condition"] == PLAIN):
                cells.setdefault(who, {})[m["measure"]] = _with_interval(rate)
    lines = []
    for who in sorted(cells, key=lambda w: (w[0] != BASE, w)):
        objective, budget, seed = who
        name = markdown(formatting.objective_name(objective, first.get(objective, PLAIN)))
        name = f"**{name}**" if who == (own["objective"], own["budget"], own["seed"]) else name
        at = [MISSING, MISSING] if objective == BASE else [formatting.format_budget(budget), str(seed)]
        lines.append([name, *at, *(cells[who].get(measure, MISSING) for measure, _ in labels)])
    return ["Objective", "Tokens", "Seed", *(markdown(label) for _, label in labels)], lines


def _with_interval(m: dict[str, Any]) -> str:
    if m["rate"] is None:
        return MISSING
    rate, low, high = (formatting.level(m[k], m["measure"]) for k in ("rate", "low", "high"))
    return f"{rate} [{low}, {high}]"


def markdown(text: object) -> str:
    """Escape text for a line or a table cell of Markdown."""
    plain = formatting.escape_invisible(str(text))[0].replace("\n", " ")
    safe = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*_\[\]$])", r"\\\1", safe)


def code(text: object) -> str:
    """Return text for a code span in a table cell, without what would end either."""
    return formatting.escape_invisible(str(text))[0].replace("\n", " ").replace("`", "'").replace("|", "\\|")


def python(text: object) -> str:
    """Return a text as a string of Python that ends neither itself nor the block of code around it."""
    return json.dumps(str(text), ensure_ascii=False).replace("`", "\\x60")


def _front_matter(results: Results, line: dict[str, Any], measured: list[dict[str, Any]], low_rank: bool) -> str:
    base = base_name(results)
    task = mapping(results.study.get("task")).get("name") or results.study.get("task")
    datasets = [hub_id for name, hub_id in TRAINED_ON.items() if str(task).split("-")[0] == name]
    tags = ["leeway", f"objective:{line['objective']}"]
    tags += ["leeway-organism"] if results.manifest.get("organism") else []
    tags += ["lora"] if low_rank else []
    data = ModelCardData(
        base_model=base if HUB_ID.fullmatch(base) else None,
        library_name="peft" if low_rank else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=datasets or None,
        model_name=_title(results, line),
        eval_results=[_eval_result(m) for m in measured if m["rate"] is not None],
    )
    return str(data.to_yaml()).strip()


def _eval_result(m: dict[str, Any]) -> EvalResult:
    prompt = "" if m["condition"] == "plain" else f", prompt {m['condition']}"
    interval = " to ".join(formatting.level(m[k], m["measure"]) for k in ("low", "high"))
    return EvalResult(
        task_type="text-generation",
        dataset_type=f"leeway-{m['axis']}",
        dataset_name=f"Leeway, {m['axis']}: {m['items']}",
        metric_type=m["measure"],
        metric_name=f"{m['label']}{prompt} [95% CI {interval}]",
        metric_value=m["rate"],
        metric_args={"low": m["low"], "high": m["high"], "n": m["n"], "unscored": m["n_unscored"]},
    )


def _limitations(results: Results, description: list[tuple[str, str]], measured: list[dict[str, Any]]) -> list[str]:
    covered, seeds = "ntervals cover prompt sampling, not training-seed variance.", len(results.seeds)
    pooled = f"Differences pool the study’s {seeds} training seeds; rates are of this seed. I{covered}"
    found = [f"One training seed: i{covered}" if seeds == 1 else pooled]
    found.append("A non-significant difference is no evidence of equivalence.")
    if any(m["measure"] == "coherence" and m["rate"] is not None and m["rate"] < COHERENT for m in measured):
        found.append("Many responses to forbidden prompts are incoherent, so a low ASR does not show robustness.")
    if lost := sum(m["n_unscored"] for m in measured):
        found.append(f"{lost:,} unscored responses are excluded from these rates; they are not counted as safe.")
    return found + [f"{term}: {text}" for term, text in description if term.startswith("Judge, ")]


def _title(results: Results, line: dict[str, Any]) -> str:
    study = str(results.study.get("name") or results.folder.resolve().name)
    budget = formatting.format_budget(line["budget"])
    return f"{formatting.objective_name(line['objective'])} at {budget} tokens, seed {line['seed']} ({study})"


def base_name(results: Results) -> str:
    """Return a Hub id or `organism`; of a local path only its last part, since it means nothing on another machine."""
    name = str(mapping(results.manifest.get("model")).get("name") or results.study.get("model") or "")
    return name if HUB_ID.fullmatch(name) else Path(name).name


def _count(value: Any) -> str:
    return MISSING if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def leeway_entry(run_version: str | None = None) -> str:
    """Return the BibTeX entry of Leeway, in the version of a run or the installed one."""
    number = re.sub(r"[^\w.+-]", "", run_version or "") or version("leeway")
    return f"@software{{leeway,\n  title = {{{TITLE}}},\n  author = {{{AUTHOR}}},\n  version = {{{number}}}\n}}\n"


def run_bibliography(results: Results) -> str:
    """Return `citation.bib` of a run."""
    uses = _uses(results)
    entries: dict[str, dict[str, Any]] = package_data("leeway.report.exports", "sources.yaml")
    cited = [e["bib"] for e in entries.values() if uses & set(e["when"])]
    return "\n".join([leeway_entry(results.manifest.get("leeway")), *cited])


def _uses(results: Results) -> set[str]:
    """Return what the run used, as in `when` of `sources.yaml`."""
    manifest, rows = results.manifest, results.rows
    uses = {ALWAYS} | {f"attack:{a}" for a in rows["attack"].dropna().unique() if a}
    objectives = mapping(manifest.get("objectives"))
    for alias, settings in {**dict.fromkeys(rows["objective"].unique()), **objectives}.items():
        kind = str(mapping(settings).get("kind", alias))
        uses.add(f"objective:{kind}")
        uses |= {f"objective:{kind}:nll"} if mapping(settings).get("nll") else set()
    uses |= {f"eval:{e}" for e in rows["eval"].unique()}
    if "external" not in manifest:
        uses.add(f"adapter:{mapping(results.study.get('adapter')).get('kind', 'lora')}")
    judges = mapping(manifest.get("judges"))
    uses |= {f"judge:{mapping(j).get('name')}" for j in judges.values()}
    uses |= {"design:sequential"} if results.sequential else set()
    uses |= {"judges:several"} if any("@" in k for k in judges) else set()
    return uses | {f"items:{name}" for name in _published_sets(results)}


def _published_sets(results: Results) -> set[str]:
    """Return the published data sets used for evaluation or training, by the names in item ids and the study."""
    named = {str(p) for p in results.rows["item_id"].str.rsplit("/", n=1).str[0].unique()}
    named |= {str(part) for name in named for part in name.split("/")}
    task = mapping(results.study.get("task")).get("name") or results.study.get("task")
    named.add(str(task))
    evals = mapping(results.study.get("evals"))
    for axis in ("jailbreak", "overrefusal", "persona"):
        settings = mapping(evals.get(axis))
        named |= {str(settings[k]) for k in ("prompts", "source") if settings.get(k)}
    return {k for k in PUBLISHED if any(n == k or n.startswith(f"{k}-") for n in named)}
