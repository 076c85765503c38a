"""The gate's page and examples hold what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from leeway import yaml_config
from leeway.cli import app
from leeway.gate.rules import ALL, Rules, load
from leeway.stats import items_needed
from leeway.yaml_config import read

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "gate.md").read_text("utf-8")


def commands(text: str) -> list[list[str]]:
    """Every `leeway …` that stands in a shell line."""
    found = []
    for line in text.splitlines():
        words = shlex.split(line.replace("$GITHUB", "GITHUB"), comments=True)
        if words[:1] == ["leeway"]:
            found.append(words[1:])
    return found


def check_command(words: list[str]) -> None:
    """The command and all its options are the command line's own."""
    known = get_command(app).commands[words[0]]
    options = {o for p in known.params for o in p.opts}
    given = {w for w in words if w.startswith("--")}
    assert given <= options, given - options


def test_the_workflow_is_yaml_and_its_commands_exist():
    workflow = yaml_config.load((DOCS / "examples/gate.yml").read_text("utf-8"))
    steps = workflow["jobs"]["gate"]["steps"]
    shell = "\n".join(step.get("run", "") for step in steps)
    found = commands(shell)
    assert [words[0] for words in found] == ["audit", "gate"]
    for words in found:
        check_command(words)
    assert "$GITHUB_STEP_SUMMARY" in shell
    kept = next(s for s in steps if "upload-artifact" in s.get("uses", ""))
    out = found[1][found[1].index("--out") + 1]
    assert f"{out}/" in kept["with"]["path"].split()
    assert f"{out}/gate.md" in shell
    always = [s for s in steps if s.get("if") == "always()"]
    assert len(always) == 2  # the summary and the evidence come when the gate says no, too


def test_the_example_rules_load():
    found = load(DOCS / "examples/gate-rules.yaml")
    assert {r.measure for r in found.rules} >= {"asr", "coherence", "accuracy"}
    assert found.checkpoint.objective == ALL  # so that they decide on a study of several objectives as well


def test_the_rules_on_the_page_load():
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 1
    assert len(Rules.model_validate(read(blocks[0], "page")).rules) == 7


def test_the_commands_on_the_page_exist():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for words in (w for b in blocks for w in commands(b.replace("|| ", "# "))):
        check_command(words)


def test_the_table_of_items_is_the_formula():
    """A prompt moves by +1 or −1 with the share that changes, so that this share is its variance; none: NaN."""
    rows = re.findall(r"^\| (\d+) points? \|(.+)\|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 5
    for margin, cells in rows:
        told = [int(cell.replace(",", "")) for cell in cells.split("|")]
        deviations = [float("nan"), *(share**0.5 for share in (0.05, 0.1, 0.2, 0.4))]
        assert told == [1 + items_needed(0.0, deviation, 1, -int(margin) / 100) for deviation in deviations]


@pytest.mark.parametrize("name", ["gate.yml", "gate-rules.yaml"])
def test_the_page_links_to_its_examples(name: str):
    assert f"(examples/{name})" in PAGE
    assert (DOCS / "examples" / name).is_file()
