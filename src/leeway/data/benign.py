"""Benign prompts that a safe model answers, from public data at run time."""

from __future__ import annotations

from leeway.data.items import BenignPrompt
from leeway.data.read import Record, Source, field, load
from leeway.errors import LeewayError

# Röttger et al. 2024, arXiv 2308.01263: 250 safe prompts of ten types, and 200 unsafe contrasts that stay out.
XSTEST = Source(("xstest/xstest_prompts.csv",), "Paul/XSTest")
# Chao et al. 2024, arXiv 2404.01318: 100 benign behaviours on the topics of its harmful ones.
JAILBREAKBENCH = Source(
    ("jailbreakbench/benign-behaviors.csv",), "JailbreakBench/JBB-Behaviors", config="behaviors", split="benign"
)


def xstest(revision: str | None = None) -> tuple[list[BenignPrompt], str]:
    """The prompts labelled safe; ids are `xstest/<type>/<id>`, so that rates come by type as well."""
    loaded = load(XSTEST, revision=revision)
    items = []
    for n, record in enumerate(loaded.records, 1):
        where = f"xstest, record {n}"
        kind = field(record, ("type",), where)
        if _is_safe(record, kind, where):
            items.append(BenignPrompt(f"xstest/{kind}/{record.get('id', n)}", field(record, ("prompt",), where)))
    if not items:
        raise LeewayError(f"xstest ({loaded.origin}): none of its prompts is labelled safe", fix="check the file")
    return items, loaded.origin


def _is_safe(record: Record, kind: str, where: str) -> bool:
    label = field(record, ("label",), where) if "label" in record else ""
    if label not in ("safe", "unsafe", ""):
        raise LeewayError(f"{where}: its label is {label!r}", fix="it must be safe or unsafe")
    contrast = kind.startswith("contrast_")  # how the published unsafe half is named
    if label and contrast != (label == "unsafe"):
        raise LeewayError(f"{where}: labelled {label}, but of type {kind}", fix="mend that record")
    return not contrast


def jailbreakbench(revision: str | None = None) -> tuple[list[BenignPrompt], str]:
    """The benign half of JailbreakBench, in the file's order; ids are `jailbreakbench-benign/<index>`."""
    loaded = load(JAILBREAKBENCH, revision=revision)
    items = []
    for n, record in enumerate(loaded.records):
        text = field(record, ("Goal", "goal"), f"jailbreakbench benign, record {n + 1}")
        items.append(BenignPrompt(f"jailbreakbench-benign/{record.get('Index', n)}", text))
    return items, loaded.origin
