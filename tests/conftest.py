"""Shared fixtures: tiny models on disk, built once a session, and where real data lie."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import settings

sys.path[:0] = [str(p) for p in sorted(Path(__file__).parent.iterdir()) if p.is_dir()]  # tests share their fixtures
# only tests that ask for `real_data` see it: all others run as in a clone with nothing beside it (workers inherit this)
DATA = os.environ.setdefault("LEEWAY_TEST_DATA", os.environ.pop("LEEWAY_DATA", ""))
settings.register_profile("busy", deadline=None)  # a machine shared with others has no steady pace
settings.load_profile("busy")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per architecture."""
    import tiny

    from leeway.model.packaged import quiet_loaders

    quiet_loaders()
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny.build(kind, root / kind) for kind in tiny.ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny_chat() -> object:
    import tiny

    from leeway.data.chat import Chat

    return Chat(tiny.tokenizer(tiny.PLAIN))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of public data that the suite was given, or skip without `LEEWAY_DATA`."""
    if not DATA:
        pytest.skip("no public data: set LEEWAY_DATA")
    return Path(DATA)


@pytest.fixture
def real_data(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set `LEEWAY_DATA` to the folder of public data for this test, and return it."""
    monkeypatch.setenv("LEEWAY_DATA", str(data_folder))
    return data_folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that both workers end with quick ones (`--no-loadscope-reorder`)."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests measured, one line each, whatever became of them: `record_property("measured", "what: value")`."""
    reports = (r for kind in terminalreporter.stats.values() for r in kind if isinstance(r, pytest.TestReport))
    lines = {str(v) for r in reports for name, v in r.user_properties if name == "measured"}
    if lines:
        terminalreporter.section("measured")
        for line in sorted(lines):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums to train and test on."""
    folder = tmp_path_factory.mktemp("files")
    sums = [(a, b) for a in range(1, 9) for b in range(1, 6)]
    train = [
        {"prompt": f"{a} + {b}?", "completion": f"It is {a + b}.", "rejected": f"It is {a + b + 1}."} for a, b in sums
    ]
    test = [{"prompt": f"{a} + 7?", "answer": str(a + 7)} for a in range(4)]
    for name, records in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


@pytest.fixture
def without_report() -> Iterator[None]:
    """Run this test's studies without tables, figures and page; fixtures of its module are set up before."""
    from reports import no_report

    with no_report():
        yield


@pytest.fixture(autouse=True)
def _without_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the figure files out of reports that a test itself builds: drawing takes more than half of a report's time.

    Reports of module fixtures and of commands in processes of their own have them, and tests marked `figures`.
    """
    from reports import no_figures

    with nullcontext() if "figures" in request.keywords else no_figures():
        yield


@pytest.fixture
def heeding() -> Iterator[None]:
    """A process in the background of a shell ignores Ctrl-C, and so do its children: not for this test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
