"""A headless Chromium for the page's tests, and what a test may ask of an open page."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
ARGS += ["--disable-component-update", "--disable-sync"]


def chromium() -> str:
    """The installed browser; skips the test where there is none."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not found:
        pytest.skip("no chromium on this machine: apt-get install chromium, or set CHROMIUM to one")
    return found


@contextmanager
def running() -> Iterator[Any]:
    """A browser."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'leeway[dev]'")
    where = chromium()
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=where, args=ARGS)
        yield browser
        browser.close()


@dataclass
class Seen:
    """What an open page complained of, and what it asked the world for."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


def opened(browser: Any, page: Path, width: int = 1280, height: int = 900, **how: Any) -> tuple[Any, Seen]:
    """The report in a tab of its own, and what is noticed about it."""
    tab, seen = browser.new_context(viewport={"width": width, "height": height}, **how).new_page(), Seen()
    tab.set_default_timeout(90_000)  # a busy machine is slow, not wrong
    tab.on("console", lambda m: seen.console.append(f"{m.type}: {m.text}"))
    tab.on("pageerror", lambda e: seen.console.append(f"error: {e}"))
    tab.on("request", lambda r: seen.requests.append(r.url))
    tab.on("dialog", lambda d: (seen.dialogs.append(d.message), d.dismiss()))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", state="attached")
    return tab, seen


def until(tab: Any, expression: str, seconds: float = 90.0) -> None:
    """Wait until it is true (Playwright's own waiting evaluates text in the page, which its policy forbids)."""
    end = time.monotonic() + seconds
    while not tab.evaluate(expression):
        assert time.monotonic() < end, f"never came true: {expression}"
        time.sleep(0.03)
