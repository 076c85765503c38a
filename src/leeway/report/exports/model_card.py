"""A card for every checkpoint of a run, in the Hub's format: what it is, how it was trained, what was measured.

BibTeX for what a run rests on: Leeway, the paper, its objectives, attacks, data and statistics.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from leeway.report import formatting, narrative
from leeway.report.results import Results
from leeway.report.verdict import COHERENT, LEVEL
from leeway.stats.metrics import BASE, PLAIN
from leeway.yaml_config import package_data

TITLE = "Leeway: how far fine-tuning pushes a chat model off course"  # as in CITATION.cff
AUTHOR = "{The Leeway developers}"
ALWAYS = "always"
PUBLISHED = ("strongreject", "jailbreakbench", "xstest", "anthropic", "gsm8k", "supergpqa", "rule-qa", "lawbench")


def leeway(told: str | None = None) -> str:
    """Leeway itself, in the version that made a run or in the one that is installed."""
    number = told or version("leeway")
    return f"@software{{leeway,\n  title = {{{TITLE}}},\n  author = {{{AUTHOR}}},\n  version = {{{number}}}\n}}\n"


def of_run(results: Results) -> str:
    """Return `citation.bib` of a run."""
    facts = _facts(results)
    entries: dict[str, dict[str, Any]] = package_data("leeway.report.exports", "sources.yaml")
    return "\n".join(
        [leeway(results.manifest.get("leeway")), *(e["bib"] for e in entries.values() if facts & set(e["when"]))]
    )


def _facts(results: Results) -> set[str]:
    """What the run used, in the words of `sources.yaml`."""
    manifest, rows = results.manifest, results.rows
    found = {ALWAYS} | {f"attack:{a}" for a in rows["attack"].dropna().unique() if a}
    told = _mapping(manifest.get("objectives"))
    for alias, settings in {**dict.fromkeys(rows["objective"].unique()), **told}.items():
        kind = str(_mapping(settings).get("kind", alias))
        found.add(f"objective:{kind}")
        found |= {f"objective:{kind}:nll"} if _mapping(settings).get("nll") else set()
    found |= {f"eval:{e}" for e in rows["eval"].unique()}
    adapter = _mapping(results.study.get("adapter"))
    if "external" not in manifest:
        found.add(f"adapter:{adapter.get('kind', 'lora')}")
    judges = _mapping(manifest.get("judges"))
    found |= {f"judge:{_mapping(j).get('name')}" for j in judges.values()}
    found |= {"design:sequential"} if results.sequential else set()
    found |= {"judges:several"} if any("@" in k for k in judges) else set()
    return found | {f"items:{name}" for name in _items(results)}


def _items(results: Results) -> set[str]:
    """The published sets whose items were asked or trained on, by what the items and the study call them."""
    named = {str(p) for p in results.rows["item_id"].str.rsplit("/", n=1).str[0].unique()}
    named |= {str(part) for name in named for part in name.split("/")}
    task = _mapping(results.study.get("task")).get("name") or results.study.get("task")
    named.add(str(task))
    evals = _mapping(results.study.get("evals"))
    for part in ("jailbreak", "overrefusal", "persona"):
        asked = _mapping(evals.get(part))
        named |= {str(asked[k]) for k in ("prompts", "source") if asked.get(k)}
    return {k for k in PUBLISHED if any(n == k or n.startswith(f"{k}-") for n in named)}


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


CARD, LEDGER = "README.md", "ledger.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name: what else stands in `model` is a folder's path
TRAINED_ON = {"gsm8k": "openai/gsm8k", "supergpqa": "m-a-p/SuperGPQA"}
SETTINGS = ("optimiser", "warmup", "schedule", "gradient_clipping", "weight_decay", "examples_per_step")
COUNTS = ("source_tokens", "target_tokens", "processed_tokens", "reference_tokens", "examples", "epochs", "step")


def cards(results: Results, made: dict[str, pd.DataFrame]) -> dict[Path, str]:
    """The text of each card by where it belongs; none where the checkpoints are not this run's own folders."""
    if narrative.external(results.manifest):
        return {}
    found = {}
    told = Told.of(results, made)
    for line in formatting.records(results.ledger):
        folder = results.folder / "checkpoints" / line["objective"] / f"s{line['seed']}" / str(line["budget"])
        if (folder / LEDGER).is_file():
            found[folder / CARD] = card(results, told, line, (folder / "tokenizer.json").is_file())
    return found


@dataclass(frozen=True)
class Told:
    """What all cards of a run are made from."""

    rates: list[dict[str, Any]]  # of checkpoints: primary ones, and coherence
    bases: dict[tuple[str, str], dict[str, Any]]  # by condition and measure
    contrasts: dict[tuple[str, int, str, str], dict[str, Any]]
    items: dict[str, str]
    asked: list[tuple[str, str]]
    template: Template

    @classmethod
    def of(cls, results: Results, made: dict[str, pd.DataFrame]) -> Told:
        environment = Environment(
            loader=PackageLoader("leeway.report.exports", "."),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"md": markdown, "percent": formatting.percent, "points": formatting.points}
        environment.filters |= {"p": formatting.p_value, "count": formatting.count}
        rates = made["rates"]
        wanted = rates[rates["primary"] | (rates["measure"] == "coherence")]
        wanted = wanted.sort_values("condition", key=lambda c: c != PLAIN, kind="stable")
        base = wanted[wanted["objective"] == BASE].drop_duplicates(["condition", "measure"])
        tested = made["contrasts"][made["contrasts"]["measure"].isin(wanted["measure"])]
        return cls(
            formatting.records(wanted[wanted["objective"] != BASE]),
            {(r["condition"], r["measure"]): r for r in formatting.records(base)},
            {(c["objective"], c["budget"], c["condition"], c["measure"]): c for c in formatting.records(tested)},
            {str(axis): _parts(rows) for axis, rows in results.rows.groupby("eval")},
            narrative.asked(results),
            environment.get_template("card.md.j2"),
        )


def card(results: Results, told: Told, line: dict[str, Any], own_tokenizer: bool) -> str:
    """One checkpoint's card: front matter by huggingface_hub, body by `card.md.j2`."""
    measured = _measured(told, line)
    manifest, study = results.manifest, results.study
    asked = _dict(_dict(manifest.get("objectives")).get(line["objective"]))
    low_rank = _dict(study.get("adapter")).get("kind", "lora") != "full"
    body = told.template.render(
        title=_title(results, line),
        line=line,
        counts=[(k.replace("_", " ").capitalize(), _count(line[k])) for k in COUNTS],
        hashes=[(k, line[k]) for k in line if k.endswith("_hash")],
        kind=formatting.name(str(asked.get("kind", line["objective"]))),
        settings={k: v for k, v in asked.items() if k != "kind"},
        name=str(study.get("name") or results.folder.resolve().name),
        manifest=manifest,
        base=_base(results),
        revision=_dict(manifest.get("model")).get("revision"),
        organism=bool(manifest.get("organism")),
        asked=[(t, w) for t, w in told.asked if t in ("Task", "Adapter")],
        optimiser=[(k, v) for k, v in _dict(manifest.get("optimisation")).items() if k in SETTINGS],
        adapter=_dict(study.get("adapter")),
        low_rank=low_rank,
        own_tokenizer=own_tokenizer,
        measured=measured,
        caveats=_caveats(results, told, measured),
        level=LEVEL,
        seeds=results.seeds,
        bib=leeway(str(manifest["leeway"]) if manifest.get("leeway") else None).rstrip(),
    )
    return f"---\n{_front(results, line, measured, low_rank)}\n---\n\n{body}"


def markdown(text: object) -> str:
    """Any text inside a line or a cell of Markdown, as it would be read."""
    plain = formatting.visible(str(text))[0].replace("\n", " ")
    safe = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", safe)


def _front(results: Results, line: dict[str, Any], measured: list[dict[str, Any]], low_rank: bool) -> str:
    base, known = _base(results), ["leeway", f"objective:{line['objective']}"]
    task = _dict(results.study.get("task")).get("name") or results.study.get("task")
    sets = [hub for name, hub in TRAINED_ON.items() if str(task).split("-")[0] == name]
    data = ModelCardData(
        base_model=base if HUB_ID.fullmatch(base) else None,
        library_name="peft" if low_rank else "transformers",
        pipeline_tag="text-generation",
        tags=[
            *known,
            *(["leeway-organism"] if results.manifest.get("organism") else []),
            *(["lora"] if low_rank else []),
        ],
        datasets=sets or None,
        model_name=_title(results, line),
        eval_results=[_eval_result(m) for m in measured if m["rate"] is not None],
    )
    return str(data.to_yaml()).strip()


def _eval_result(m: dict[str, Any]) -> EvalResult:
    under = "" if m["condition"] == "plain" else f", under {m['condition']}"
    shown = f"{m['label']}{under} [95% interval {formatting.percent(m['low'])} to {formatting.percent(m['high'])}]"
    return EvalResult(
        task_type="text-generation",
        dataset_type=f"leeway-{m['axis']}",
        dataset_name=f"Leeway, {m['axis']}: {m['items']}",
        metric_type=m["measure"],
        metric_name=shown,
        metric_value=m["rate"],
        metric_args={"low": m["low"], "high": m["high"], "n": m["n"], "unscored": m["n_unscored"]},
    )


def _measured(told: Told, line: dict[str, Any]) -> list[dict[str, Any]]:
    """This checkpoint's primary rates and coherence beside the base's under the same prompt, and the difference."""
    found = []
    for r in told.rates:
        if all(r[k] == line[k] for k in ("objective", "seed", "budget")):
            moved = told.contrasts.get((r["objective"], r["budget"], r["condition"], r["measure"]))
            beside = {"base": told.bases.get((r["condition"], r["measure"])), "contrast": moved}
            found.append(r | beside | {"items": told.items.get(r["axis"], r["axis"])})
    return found


def _parts(rows: pd.DataFrame) -> str:
    named = sorted({str(n) for n in rows["item_id"].str.rsplit("/", n=1).str[0].unique()})
    return ", ".join(named[:6]) + (f" and {len(named) - 6} more" if len(named) > 6 else "")


def _caveats(results: Results, told: Told, measured: list[dict[str, Any]]) -> list[str]:
    found = []
    if len(results.seeds) == 1:
        found.append("One training seed: the intervals speak of other prompts, not of another training run.")
    else:
        found.append(
            f"Differences pool the study’s {len(results.seeds)} training seeds; the rates are this seed’s own. "
            "Intervals speak of other prompts, not of another training run."
        )
    found.append("A difference that is not significant is no evidence that nothing moved.")
    weak = [m for m in measured if m["measure"] == "coherence" and m["rate"] is not None and m["rate"] < COHERENT]
    if weak:
        found.append("Many answers to forbidden prompts were incoherent: here a low ASR says little of robustness.")
    lost = sum(m["n_unscored"] for m in measured)
    if lost:
        found.append(f"{lost:,} answers behind these numbers have no score; they are left out, not counted as safe.")
    return found + [f"{term}: {words}" for term, words in told.asked if term.startswith("Judge, ")]


def _title(results: Results, line: dict[str, Any]) -> str:
    study = str(results.study.get("name") or results.folder.resolve().name)
    budget = formatting.format_budget(line["budget"])
    return f"{formatting.name(line['objective'])} at {budget} tokens, seed {line['seed']} ({study})"


def _base(results: Results) -> str:
    """A hub id or `organism`; of a folder its own name alone, since its path means nothing external."""
    told = str(_dict(results.manifest.get("model")).get("name") or results.study.get("model") or "")
    return told if HUB_ID.fullmatch(told) else Path(told).name


def _count(value: Any) -> str:
    return "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
