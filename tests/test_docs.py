"""The documentation: its examples are run, its commands and study files are read, its links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from docs_blocks import Block, Session, alike, blocks, commands, named

from leeway import yaml_config
from leeway.cli import app
from leeway.errors import LeewayError
from leeway.study.load import PRESETS, load, parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [b for page in PAGES for b in blocks(page)]
RUN = [page for page in PAGES if any(b.mark == "run" for b in blocks(page))]
WHOLE = """
name: x
model: organism
task: {name: organism}
objectives: [sft]
budgets: [1k]
auxiliary: {general: organism, safety: organism}
evals: {capability: [organism]}
"""


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_what_a_page_says_to_do_can_be_done(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # one worker: this process
    monkeypatch.delenv("LEEWAY_DATA", raising=False)
    before, session, began = set(sys.modules), Session(tmp_path), time.perf_counter()
    try:
        for block in blocks(page):
            session.do(block)
    finally:
        for name in set(sys.modules) - before:  # two pages may have a file of one name
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]
    record_property("measured", f"docs: {page.name} runs in {time.perf_counter() - began:.0f} s")


def test_output_is_compared() -> None:
    assert alike("a\n…\nc", "a\nb\nb\nc\n")
    assert alike("a\n…\nc", "a\nc")
    assert alike("took … s", "took 3 s")
    assert not alike("a\n…\nc", "a\nb\n")
    assert not alike("took … s", "took 3 min")
    assert not alike("a", "a\nb")


def test_console_blocks_are_read() -> None:
    assert commands("$ a \\\n    b\nx\ny\n$ c\n") == [("a  b", "x\ny\n"), ("c", "")]


# --- commands


def parsed(words: list[str]) -> None:
    """Let the command line read the words without doing anything."""
    command: Any = typer.main.get_command(app)
    context = None
    while True:
        rest = words[1:]
        context = command.make_context(words[0], rest, parent=context)
        if not hasattr(command, "commands"):
            break
        left = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = command.resolve_command(context, left)
        words = [str(name), *rest]
    _overrides(command.name, context.params)


def _overrides(name: str, given: dict[str, Any]) -> None:
    """`key=value` words have to fit a study: the preset that is named, or some preset."""
    settings = tuple(w for w in (given.get("model"), *(given.get("overrides") or ())) if w and "=" in w)
    if name not in ("plan", "show", "run") or not settings:
        return
    known = [given["study"]] if given["study"] in PRESETS else list(PRESETS)
    faults = []
    for preset in known:
        try:
            load(preset, settings)
        except LeewayError as error:
            faults.append(str(error))
    assert len(faults) < len(known), faults[0]


COMMANDS = [(b, line) for b in BLOCKS if b.mark != "run" for line in named(b.text)]  # the others are carried out


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=[f"{b}-{k}" for k, (b, _) in enumerate(COMMANDS)])
def test_every_command_is_one_that_leeway_has(block: Block, line: str) -> None:
    words = shlex.split(re.sub(r"\s[|>&].*", "", line), comments=True)
    words = [w for w in words if w not in ("-v", "…")]
    if "--help" not in words:
        try:
            parsed(words)
        except Exception as error:
            raise AssertionError(f"{block}: {line}: {error}") from error


def test_a_command_that_is_not_there_is_seen() -> None:
    for wrong in (["leeway", "rum"], ["leeway", "run", "demo", "--outt", "x"], ["leeway", "run"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parsed(wrong)
    with pytest.raises(AssertionError, match=r"optim\.lrr"):
        parsed(["leeway", "run", "demo", "optim.lrr=1"])


# --- study files and Python


STUDIES = [b for b in BLOCKS if b.mark == "study"]


@pytest.mark.parametrize("block", STUDIES, ids=str)
def test_a_study_file_in_a_page_is_one(block: Block) -> None:
    assert block.language == "yaml"
    given = yaml_config.load(block.text)
    whole = yaml_config.load(WHOLE)
    missing = {k: v for k, v in whole.items() if k not in given}
    parse(block.text + yaml_config.dump(missing), str(block))


def test_every_kind_of_block_is_there() -> None:
    """A reader of blocks that finds none would pass every page."""
    assert len(COMMANDS) > 20
    assert len(STUDIES) >= 3
    assert len(RUN) >= 5
    known = {"run", "output", "study", ""}
    assert {b.mark for b in BLOCKS} <= known, [str(b) for b in BLOCKS if b.mark not in known]
    assert not [str(b) for b in BLOCKS if b.language == "yaml" and not b.mark and not b.title and "evals" in b.text]
    for page in PAGES:
        fences = page.read_text().count("\n```")
        assert fences == 2 * len(blocks(page)), f"{page.name}: a fence that is not closed, or written otherwise"


PYTHON = [b for b in BLOCKS if b.language == "python" and b.mark != "run"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_that_is_not_run_imports_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("leeway"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{block}: {node.module} has no {name.name}"


def test_recipes_for_clusters_are_read() -> None:
    """No cluster is here: the shell reads the scripts, and the job's parts have to fit each other."""
    import subprocess

    found = {b.title: b for b in blocks(ROOT / "docs" / "running.md") if b.title}
    for block in (b for b in found.values() if b.language == "bash"):
        read = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
        assert (read.returncode, read.stderr) == (0, ""), block
    assert {b.language for b in found.values()} == {"bash", "yaml"}
    job = yaml_config.load(found["leeway-job.yaml"].text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    parsed(shlex.split(job["spec"]["entrypoint"]))
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert all(isinstance(v, str) for group in groups for v in group["rayStartParams"].values())
    assert len({yaml_config.dump(pod["volumes"]) for pod in pods}) == 1
    assert len({(c["image"], yaml_config.dump(c["volumeMounts"])) for pod in pods for c in pod["containers"]}) == 1
    mounted = pods[0]["containers"][0]["volumeMounts"][0]
    assert mounted["name"] == pods[0]["volumes"][0]["name"]
    assert f"--out {mounted['mountPath']}/" in job["spec"]["entrypoint"]


# --- links and the site


def test_the_hash_of_the_bundled_claims_is_the_one_that_a_plan_prints() -> None:
    claims = load("objective-matters").claims
    assert claims is not None
    assert f"hash {claims.hash}:" in (ROOT / "docs" / "objective-matters.md").read_text("utf-8")


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [f for f in found if not f.startswith(("http", "#"))]
    assert len(local) > 5
    missing = [f for f in local if not (ROOT / f.partition("#")[0]).exists()]
    assert not missing, missing


def test_every_page_is_in_the_navigation_or_made_by_the_build() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert [p.name for p in PAGES[1:] if f": {p.name}\n" not in text] == []


class Links(HTMLParser):
    """What a page fetches by itself, and where it leads."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetches = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
        if tag in fetches and given.get(fetches[tag]) and given.get("rel") != "canonical":
            self.fetched.append(str(given[fetches[tag]]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; any warning (a broken link or anchor, a page outside the navigation) is an error."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    import subprocess

    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return out


def test_the_site_has_every_command_and_every_public_name(site: Path) -> None:
    commands_page = (site / "cli.html").read_text()
    root: Any = typer.main.get_command(app)
    for name, command in root.commands.items():
        assert f"leeway {name}" in commands_page
        for parameter in command.params:
            assert all(o in commands_page for o in parameter.opts if o.startswith("--") and o != "--help"), parameter
    page = (site / "api.html").read_text()
    import leeway
    from leeway import stats

    for name in [*leeway.__all__, *stats.__all__]:
        assert re.search(rf'id="leeway\.[\w.]*\b{name}"', page), name


def test_the_site_fetches_nothing(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        links = Links()
        links.feed(path.read_text())
        away = [f for f in links.fetched if re.match(r"(?:https?:)?//", f)]
        assert not away, f"{path.name}: {away}"
    for style in site.rglob("*.css"):
        away = re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]*", style.read_text())
        assert not away, f"{style.name}: {away}"
