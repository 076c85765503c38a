"""BibTeX for what a run rests on: Leeway, the paper, its objectives, attacks, data and statistics."""

from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files
from typing import Any

import yaml

from leeway.report.results import Results

TITLE = "Leeway: how far fine-tuning pushes a chat model off course"  # as in CITATION.cff
AUTHOR = "{The Leeway developers}"
ALWAYS = "always"
PUBLISHED = ("strongreject", "jailbreakbench", "xstest", "anthropic", "gsm8k", "supergpqa", "rule-qa", "lawbench")


def leeway(told: str | None = None) -> str:
    """Leeway itself, in the version that made a run or in the one that is installed."""
    number = told or version("leeway")
    return f"@software{{leeway,\n  title = {{{TITLE}}},\n  author = {{{AUTHOR}}},\n  version = {{{number}}}\n}}\n"


def of_run(results: Results) -> str:
    """`citation.bib` of a run."""
    return _bib(_facts(results), str(results.manifest.get("leeway") or version("leeway")))


def of_leeway() -> str:
    """What to cite where no run is named: Leeway, the paper, and the statistics that every run uses."""
    return _bib({ALWAYS}, version("leeway"))


def _bib(facts: set[str], number: str) -> str:
    text = files("leeway.report.files").joinpath("sources.yaml").read_text("utf-8")
    entries: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return "\n".join([leeway(number), *(e["bib"] for e in entries.values() if facts & set(e["when"]))])


def _facts(results: Results) -> set[str]:
    """What the run used, in the words of `sources.yaml`."""
    manifest, rows = results.manifest, results.rows
    found = {ALWAYS} | {f"attack:{a}" for a in rows["attack"].dropna().unique() if a}
    told = _dict(manifest.get("objectives"))
    for alias, settings in {**dict.fromkeys(rows["objective"].unique()), **told}.items():
        kind = str(_dict(settings).get("kind", alias))
        found.add(f"objective:{kind}")
        found |= {f"objective:{kind}:nll"} if _dict(settings).get("nll") else set()
    found |= {f"eval:{e}" for e in rows["eval"].unique()}
    adapter = _dict(results.study.get("adapter"))
    if "elsewhere" not in manifest:
        found.add(f"adapter:{adapter.get('kind', 'lora')}")
    judges = _dict(manifest.get("judges"))
    found |= {f"judge:{_dict(j).get('name')}" for j in judges.values()}
    found |= {"design:sequential"} if results.sequential else set()
    found |= {"judges:several"} if any("@" in k for k in judges) else set()
    return found | {f"items:{name}" for name in _items(results)}


def _items(results: Results) -> set[str]:
    """The published sets whose items were asked or trained on, by what the items and the study call them."""
    named = {str(p) for p in results.rows["item_id"].str.rsplit("/", n=1).str[0].unique()}
    named |= {str(part) for name in named for part in name.split("/")}
    task = _dict(results.study.get("task")).get("name") or results.study.get("task")
    named.add(str(task))
    evals = _dict(results.study.get("evals"))
    for part in ("jailbreak", "overrefusal", "persona"):
        asked = _dict(evals.get(part))
        named |= {str(asked[k]) for k in ("prompts", "source") if asked.get(k)}
    return {k for k in PUBLISHED if any(n == k or n.startswith(f"{k}-") for n in named)}


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
