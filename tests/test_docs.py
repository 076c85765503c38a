"""The documentation: examples run, commands and study files parse, links and module names resolve, the site builds."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from docs_blocks import Block, Session, blocks, commands, leeway_commands, matches
from pydantic import BaseModel

from leeway import yaml_config
from leeway.cli import app
from leeway.errors import LeewayError
from leeway.report import rebuild
from leeway.study.load import PRESETS, load, parse
from leeway.study.spec import Spec

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [b for page in PAGES for b in blocks(page)]
RUN = [page for page in PAGES if any(b.mark == "run" for b in blocks(page))]
COMPLETE = """
name: x
model: organism
task: {name: organism}
objectives: [sft]
budgets: [1k]
auxiliary: {general: organism, safety: organism}
evals: {capability: [organism]}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.figures] * (p.stem == "tutorial"), id=p.stem) for p in RUN]
)
def test_examples_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # no worker processes
    monkeypatch.delenv("LEEWAY_DATA", raising=False)
    before, session, start = set(sys.modules), Session(tmp_path), time.perf_counter()
    try:
        for block in blocks(page):
            session.run(block)
    finally:
        for name in set(sys.modules) - before:  # two pages may have a module of the same name
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
                del sys.modules[name]
    record_property("measured", f"docs: {page.name} runs in {time.perf_counter() - start:.0f} s")


def test_ellipsis_matches_any_text() -> None:
    assert matches("a\n…\nc", "a\nb\nb\nc\n")
    assert matches("a\n…\nc", "a\nc")
    assert matches("took … s", "took 3 s")
    assert not matches("a\n…\nc", "a\nb\n")
    assert not matches("took … s", "took 3 min")
    assert not matches("a", "a\nb")


def test_console_blocks_are_split_into_commands() -> None:
    assert commands("$ a \\\n    b\nx\ny\n$ c\n") == [("a  b", "x\ny\n"), ("c", "")]


# --- commands


def parse_command(words: list[str]) -> None:
    """Parse a command line without running it."""
    command: Any = typer.main.get_command(app)
    context = None
    while True:
        rest = words[1:]
        context = command.make_context(words[0], rest, parent=context)
        if not hasattr(command, "commands"):
            break
        remaining = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, rest = command.resolve_command(context, remaining)
        words = [str(name), *rest]
    _check_overrides(command.name, context.params)


def _check_overrides(name: str, params: dict[str, Any]) -> None:
    """Check that `key=value` words fit the named preset, or any preset."""
    settings = tuple(w for w in (params.get("model"), *(params.get("overrides") or ())) if w and "=" in w)
    if name not in ("plan", "show", "run") or not settings:
        return
    presets = [params["study"]] if params["study"] in PRESETS else list(PRESETS)
    errors = []
    for preset in presets:
        try:
            load(preset, settings)
        except LeewayError as error:
            errors.append(str(error))
    assert len(errors) < len(presets), errors[0]


COMMANDS = [(b, line) for b in BLOCKS if b.mark != "run" for line in leeway_commands(b.text)]  # the others run


@pytest.mark.parametrize(("block", "line"), COMMANDS, ids=[f"{b}-{k}" for k, (b, _) in enumerate(COMMANDS)])
def test_every_command_parses(block: Block, line: str) -> None:
    words = shlex.split(re.sub(r"\s[|>&].*", "", line), comments=True)
    words = [w for w in words if w not in ("-v", "…")]
    if "--help" not in words:
        try:
            parse_command(words)
        except Exception as error:
            raise AssertionError(f"{block}: {line}: {error}") from error


def test_unknown_commands_options_and_keys_are_detected() -> None:
    for wrong in (["leeway", "rum"], ["leeway", "run", "demo", "--outt", "x"], ["leeway", "run"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse_command(wrong)
    with pytest.raises(AssertionError, match=r"optim\.lrr"):
        parse_command(["leeway", "run", "demo", "optim.lrr=1"])


# --- study files and Python


STUDIES = [b for b in BLOCKS if b.mark == "study"]


@pytest.mark.parametrize("block", STUDIES, ids=str)
def test_study_files_parse(block: Block) -> None:
    assert block.language == "yaml"
    keys = yaml_config.load(block.text)
    complete = yaml_config.load(COMPLETE)
    missing = {k: v for k, v in complete.items() if k not in keys}
    parse(block.text + yaml_config.dump(missing), str(block))


def test_every_kind_of_block_is_found() -> None:
    """A parser that finds no blocks would pass every page."""
    assert len(COMMANDS) > 20
    assert len(STUDIES) >= 3
    assert len(RUN) >= 5
    marks = {"run", "output", "study", ""}
    assert {b.mark for b in BLOCKS} <= marks, [str(b) for b in BLOCKS if b.mark not in marks]
    assert not [str(b) for b in BLOCKS if b.language == "yaml" and not b.mark and not b.title and "evals" in b.text]
    for page in PAGES:
        fences = page.read_text().count("\n```")
        assert fences == 2 * len(blocks(page)), f"{page.name}: an unclosed or unusual fence"


PYTHON = [b for b in BLOCKS if b.language == "python" and b.mark != "run"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_imports_of_python_that_is_not_run_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("leeway"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{block}: {node.module} has no {name.name}"


def test_cluster_recipes_are_consistent() -> None:
    """Without a cluster: the shell parses the scripts, and the parts of the job must fit each other."""
    import subprocess

    recipes = {b.title: b for b in blocks(ROOT / "docs" / "running.md") if b.title}
    for block in (b for b in recipes.values() if b.language == "bash"):
        parsed = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
        assert (parsed.returncode, parsed.stderr) == (0, ""), block
    assert {b.language for b in recipes.values()} == {"bash", "yaml"}
    job = yaml_config.load(recipes["leeway-job.yaml"].text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    parse_command(shlex.split(job["spec"]["entrypoint"]))
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


def test_hash_of_the_bundled_claims_is_the_one_in_the_plan() -> None:
    claims = load("objective-matters").claims
    assert claims is not None
    assert f"hash {claims.hash}:" in (ROOT / "docs" / "claims.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_links_outside_the_site_resolve(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text())
    local = [link for link in links if not link.startswith(("http", "#"))]
    assert len(local) > 5 or name != "README.md"
    missing = [link for link in local if not (ROOT / link.partition("#")[0]).exists()]
    assert not missing, missing


def test_modules_named_in_pages_exist() -> None:
    rooms = "|".join(p.name for p in (ROOT / "src/leeway").iterdir() if p.is_dir() and p.name != "__pycache__")
    named = {(p.name, m) for p in PAGES for m in re.findall(rf"`((?:{rooms})/(?!\d)[\w./-]*)", p.read_text())}
    assert len(named) > 30
    missing = sorted((page, m) for page, m in named if not _is_module(m))
    assert not missing, missing


def test_every_room_is_on_the_map_and_in_the_readme() -> None:
    rooms = {p.name for p in (ROOT / "src/leeway").iterdir() if p.is_dir() and p.name != "__pycache__"}
    for page in (ROOT / "README.md", ROOT / "docs" / "how-it-works.md"):
        text = page.read_text()
        assert not [room for room in rooms if f"{room}/" not in text], page.name


def test_every_key_of_a_study_is_documented() -> None:
    pages = ("study-file.md", "evals.md", "jailbreak.md", "running.md", "claims.md")
    words = set(re.findall(r"\w+", "".join((ROOT / "docs" / page).read_text() for page in pages)))
    assert sorted(k for k in _keys(Spec, set()) if k.rpartition(".")[2] not in words) == []


def _keys(model: type[BaseModel], seen: set[type]) -> Iterator[str]:
    """Yield every setting of a model and of the models in it."""
    seen.add(model)
    for name, field in model.model_fields.items():
        if (model.__name__, name) == ("ObjectiveSpec", "alias"):
            continue  # the key of an entry, not a key inside it
        yield f"{model.__name__}.{field.alias or name}"
        for part in _models(field.annotation):
            if part not in seen:
                yield from _keys(part, seen)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def test_every_column_of_contrasts_is_documented() -> None:
    schema = rebuild.schema()["properties"]["contrasts"]["items"]["properties"]
    text = (ROOT / "docs" / "statistics.md").read_text()
    assert [column for column in schema if f"`{column}`" not in text] == []


def _is_module(name: str) -> object:
    path = ROOT / "src/leeway" / name.rstrip("/")
    module, _, attribute = path.name.partition(".")
    return (
        path.exists() or path.with_suffix(".py").exists() or bool(attribute and (path.parent / f"{module}.py").exists())
    )


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert [p.name for p in PAGES[1:] if f": {p.name}\n" not in text] == []


class Links(HTMLParser):
    """URLs that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        sources = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
        if tag in sources and attributes.get(sources[tag]) and attributes.get("rel") != "canonical":
            self.fetched.append(str(attributes[sources[tag]]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; any warning (a broken link or anchor, a page outside the navigation) is an error."""
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


def test_site_has_every_command_and_public_name(site: Path) -> None:
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


def test_site_fetches_nothing(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for path in pages:
        links = Links()
        links.feed(path.read_text())
        remote = [url for url in links.fetched if re.match(r"(?:https?:)?//", url)]
        assert not remote, f"{path.name}: {remote}"
    for style in site.rglob("*.css"):
        remote = re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]*", style.read_text())
        assert not remote, f"{style.name}: {remote}"
