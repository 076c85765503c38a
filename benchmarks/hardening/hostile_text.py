"""Hostile text in a finished run: what models, judges, servers, files and authors wrote, in all that Leeway writes.

A small run is forged: its answers, prompts, judge's notes, reasons, ids, origins, names and claims hold texts that are
code somewhere. Then every output is made and read by what reads it: a browser, a Markdown parser, a CSV reader, an XML
parser, Inspect, a TeX scanner, a terminal. A text must come out as text, or with its invisible characters spelled.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd

from benchmarks.hardening.attempts import CONTROL, Attempt, Tally, attempt
from benchmarks.hardening.small_run import small_run
from benchmarks.hardening.table import Line

MARK = "owned7"  # a word that only these texts hold
PAYLOADS = (
    f"</script><script>document.title='{MARK}'</script>",
    f"<img src=x onerror=\"document.title='{MARK}'\">",
    f"<svg onload=alert('{MARK}')>",
    f'" onmouseover="alert(\'{MARK}\')" x="',
    f"</textarea></style></title><iframe srcdoc='<b>{MARK}'></iframe>",
    f"<base href=//{MARK}.invalid><meta http-equiv=refresh content='0;url=//{MARK}.invalid'>",
    f"<!-- {MARK} --!><![CDATA[ ]]>",
    f"{{{{ 7*7 }}}} {{% include '/etc/passwd' %}} ${{7*7}} {MARK}",
    f"[{MARK}](javascript:alert(1)) ![x](http://{MARK}.invalid/x.png) <http://{MARK}.invalid>",
    f"\n\n# {MARK}\n\n| a | b |\n|---|---|\n```\n~~~\n---\nlicense: {MARK}\n",
    f"`{MARK}` **x** | y \\| z $x$ $$y$$",
    f"\\input{{/etc/passwd}} \\write18{{touch {MARK}}} %& $x$ ^^5c ~ # _ {{ }}",
    f"\\end{{tabular}} \\catcode`\\@=0 @def {MARK}",
    f'=HYPERLINK("http://{MARK}.invalid","x")',
    f"+1+cmd|' /C {MARK}'!A0",
    f"-2+3 {MARK}",
    f"@SUM(1+1) {MARK}",
    f"\t=1+1 {MARK}",
    f"\x1b[2J\x1b]0;{MARK}\x07\x1b[31m red",
    f"\x9b31m {MARK} \x08\x08\x7f\r overwritten",
    f"\u202e{MARK}\u2066 gpj.exe \u200b\u2028\u2029\ufeff\U000e0041",
    f"[bold red]{MARK}[/] [link=file:///etc/passwd]x[/link] [/x]",
    f"]]>&xxe;<!DOCTYPE x [<!ENTITY xxe SYSTEM 'file:///etc/passwd'>]> {MARK}",
    f"\x00\x01\ufffe {MARK}",
    f"'; DROP TABLE runs; -- {MARK}",
    f"../../../../tmp/{MARK}",
    f"{MARK} " + "a" * 20_000,
)
INLINE = {"text", "softbreak", "hardbreak", "code_inline", "strong_open", "strong_close", "em_open", "em_close"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--browser", default=shutil.which("chromium"), help="Chromium, for the pages")


def run(options: argparse.Namespace) -> list[Line]:
    """Make every output of a forged run, and look for text that is not inert."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = options.folder
    finished = forge(small_run(folder), folder / "forged")
    outputs = _outputs(finished, folder, options.browser)
    lines = []
    for name, make in outputs.items():
        tally = Tally(f"hostile text, {name}")
        found = attempt(lambda m=make, t=tally: [t.add(*one) for one in m()], folder, Path.home(), limit_s=600)  # type: ignore[misc]
        if found.failed and not (found.ended == "process" and "playwright" in found.detail):  # the campaign's browser
            tally.add(found, name)
        lines.append(tally.line())
    return lines


def forge(source: Path, out: Path) -> Path:
    """Return a copy of a run with hostile text in every place that text of others can reach; its hashes agree."""
    from leeway.hashing import file_digest

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source, out)
    rows = pd.read_parquet(out / "rows.parquet")
    texts = [PAYLOADS[n % len(PAYLOADS)] for n in range(len(rows))]
    storable = [t.replace("\ufffe", "") for t in texts]
    for column in ("prompt", "response"):
        rows[column] = [f"{t} {v}" for t, v in zip(storable, rows[column].fillna(""), strict=True)]
    rows["judge_raw"] = [
        v if v.startswith("{") and '"p_yes"' in v else t
        for t, v in zip(storable, rows["judge_raw"].fillna(""), strict=True)
    ]
    some = rows.index % 9 == 0
    rows.loc[some, ["score", "outcome"]] = [float("nan"), None]
    rows.loc[some, "unscored_reason"] = [
        f"no answer: {t}" if n % 2 else t for n, t in enumerate(storable) if n % 9 == 0
    ]
    ids = {i: f"{PAYLOADS[n % len(PAYLOADS)]}/{i}" for n, i in enumerate(rows["item_id"].unique())}
    persona = rows["eval"] == "persona"
    rows.loc[~persona, "item_id"] = rows.loc[~persona, "item_id"].map(ids)
    rows["cluster"] = rows["cluster"].map(lambda c: ids.get(c, c))
    rows.to_parquet(out / "rows.parquet", index=False)
    manifest = json.loads((out / "manifest.json").read_text())
    _forge_manifest(manifest)
    manifest["file_hashes"]["rows.parquet"] = file_digest(out / "rows.parquet")
    manifest["file_hashes"].pop("learning.parquet", None)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def _forge_manifest(manifest: dict[str, Any]) -> None:
    manifest["model"]["name"] = f'/models/{PAYLOADS[1]}`"; import os #'
    manifest["model"]["revision"] = f'{PAYLOADS[10]}"\n'
    manifest["command"], manifest["leeway"] = f"leeway run {PAYLOADS[18]}", f"0.1.0{PAYLOADS[0]}"
    for n, judge in enumerate(manifest["judges"].values()):
        judge["note"] = PAYLOADS[n % len(PAYLOADS)]
        judge["model"] = PAYLOADS[(n + 5) % len(PAYLOADS)]
    for n, attack in enumerate(manifest["attacks"].values()):
        attack["origin"] = PAYLOADS[(n + 9) % len(PAYLOADS)]
    origins = manifest["data"]["origins"]
    manifest["data"]["origins"] = {k: PAYLOADS[n % len(PAYLOADS)] for n, k in enumerate(origins)}
    manifest["environment"] = {f"x{n}": text for n, text in enumerate(PAYLOADS)}


Findings = Iterable[tuple[Attempt, str]]


def _outputs(finished: Path, folder: Path, browser: str | None) -> dict[str, Callable[[], Findings]]:
    return {
        "report page": lambda: _page(finished, browser),
        "LaTeX": lambda: _latex(finished),
        "CSV": lambda: _csv(finished, folder),
        "model cards": lambda: _cards(finished),
        "JUnit, Markdown and JSON of a gate": lambda: _gate(finished, folder),
        "terminal": lambda: _terminal(finished, folder),
        "Inspect logs": lambda: _inspect(finished, folder),
        "redacted export": lambda: _redacted(finished, folder),
        "comparison of runs": lambda: _compared(finished, folder, browser),
        "error messages": _messages,
    }


def _judged(ok: bool, what: str, detail: str = "") -> tuple[Attempt, str]:
    return (Attempt("accepted") if ok else Attempt("message", what, detail[:200])), what


def _page(finished: Path, browser: str | None) -> Findings:
    from leeway.report import build

    yield from _html(build(finished), browser)


def _html(page: Path, browser: str | None) -> Findings:
    """Open a page; nothing of the texts may run, be requested, or be an element."""
    text = page.read_text("utf-8")
    body = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    yield _judged(not CONTROL.search(body), "invisible characters in the page", repr(CONTROL.findall(body)[:5]))
    yield _judged(MARK in text, "the texts are not in the page at all")
    if not browser:
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--headless", "--no-sandbox"])
        tab = chromium.new_page()
        tab.set_default_timeout(300_000)
        requests: list[str] = []
        events: list[str] = []
        tab.on("request", lambda r: requests.append(r.url))
        tab.on("dialog", lambda d: (events.append(d.message), d.dismiss()))
        tab.on("pageerror", lambda e: events.append(str(e)))
        tab.goto(page.as_uri())
        tab.wait_for_load_state("load")
        tab.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        tab.wait_for_timeout(3_000)
        yield _judged(MARK not in tab.title(), "the title was changed")
        yield _judged(all(r.startswith(("file:", "data:", "blob:")) for r in requests), "a request", str(requests))
        yield _judged(not events, "a dialog or an error", str(events))
        odd = "iframe, base, object, embed, [onerror], [onload], [onmouseover], img[src='x'], a[href^='javascript']"
        for selector in (
            *odd.split(", "),
            f"meta[http-equiv][content*={MARK}]",
            f"[href*='{MARK}']",
            f"[src*='{MARK}']",
        ):
            found = tab.evaluate("s => document.querySelectorAll(s).length", selector)
            yield _judged(found == 0, f"an element {selector}", str(found))
        chromium.close()


def _latex(finished: Path) -> Findings:
    """Scan for commands that a clean run's tables do not have, for control characters and unbalanced groups."""
    known = {"addlinespace", "ast", "begin", "bottomrule", "caption", "centering", "end", "endfirsthead", "endfoot"}
    known |= {
        "endhead",
        "endlastfoot",
        "footnotesize",
        "geq",
        "label",
        "ldots",
        "leq",
        "linewidth",
        "midrule",
        "multicolumn",
        "par",
    }
    known |= {"pm", "setlength", "smallskip", "tabcolsep", "times", "to", "toprule", "kappa", "usepackage", "hline"}
    known |= {
        f"text{x}" for x in ("backslash", "asciitilde", "asciicircum", "less", "greater", "bar", "quotedbl", "bf")
    }
    known |= {"textasciigrave", "textit", "textbf", "emph", "small", "noalign", "cmidrule", "multirow", "quad", "rule"}
    for path in sorted((finished / "tables").glob("*.tex")):
        text = path.read_text("utf-8")
        used = set(re.findall(r"\\([A-Za-z]+)", text))
        yield _judged(used <= known, f"{path.name}: commands", str(sorted(used - known)))
        yield _judged(not CONTROL.search(text) and "^^" not in text, f"{path.name}: characters")
        bare = re.sub(r"\\[{}\\]", "", text)
        yield _judged(bare.count("{") == bare.count("}"), f"{path.name}: groups")


def _csv(finished: Path, folder: Path) -> Findings:
    """Read every table and sheet; a cell that is no number must not begin as a formula."""
    from leeway.rescoring.label_sheet import make_sheet

    (folder / "sheet.csv").unlink(missing_ok=True)
    sheet = make_sheet(finished, n=24, out=folder / "sheet.csv").path
    for path in [*sorted((finished / "tables").glob("*.csv")), sheet]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        formulas = [c for c in cells if c.lstrip()[:1] in tuple("=+-@") and c.strip() and not _is_number(c)]
        yield _judged(not formulas, f"{path.name}: a formula", str(formulas[:2]))
        strange = [c for c in cells if CONTROL.search(c)] if path != sheet else []
        yield _judged(not strange, f"{path.name}: a control character", repr(strange[:2]))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _cards(finished: Path) -> Findings:
    """Parse cards; the texts may be no link, image, HTML, heading, code fence or key of the front matter."""
    from huggingface_hub import ModelCard

    for path in sorted(finished.glob("checkpoints/*/*/*/README.md")):
        text = path.read_text("utf-8")
        card = ModelCard(text)
        keys = set(card.data.to_dict())
        yield _judged("license" not in keys and MARK not in str(keys), "front matter", str(sorted(keys)))
        yield from _markdown(card.content.split("---\n", 2)[-1], "card")
        code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
        yield _judged(code is not None and _only_loads(code[1]), "card: its code", code[1] if code else "")


def _only_loads(code: str) -> bool:
    """Return whether a card's code is Python that imports and calls only what loads a model."""
    import ast

    try:
        tree = ast.parse(code)
    except SyntaxError:
        return False
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    plain = not any(isinstance(n, ast.Import) for n in ast.walk(tree))
    return plain and imported <= {"peft", "transformers", "leeway"}


def _markdown(text: str, name: str) -> Findings:
    from markdown_it import MarkdownIt

    for token in MarkdownIt("commonmark").enable("table").parse(text):
        inner = [token, *(token.children or [])]
        held = [t for t in inner if MARK in str(t.content) + str(t.attrs)]
        bad = [t.type for t in held if t.type in ("link_open", "image", "html_inline", "html_block", "heading_open")]
        fence = token.type == "code_block" and MARK in token.content
        yield _judged(not bad and not fence, f"{name}: {bad or 'a code block'}", token.content)


def _gate(finished: Path, folder: Path) -> Findings:
    from leeway.gate import gate

    rule = folder / "rule.yaml"
    rule.write_text("rules: [{measure: asr, margin: 0.1}]\ncheckpoint: {objective: sft}\n")
    gate(finished, rule, folder / "gated")
    xml = (folder / "gated" / "gate.xml").read_text("utf-8")
    yield _judged(ElementTree.fromstring(xml).tag == "testsuites", "gate.xml")
    yield _judged(not CONTROL.search(xml), "gate.xml: characters")
    yield from _markdown((folder / "gated" / "gate.md").read_text("utf-8"), "gate.md")
    yield _judged(isinstance(json.loads((folder / "gated" / "gate.json").read_text("utf-8")), dict), "gate.json")


def _terminal(finished: Path, folder: Path) -> Findings:
    """Print by every command that prints of a run or of a file; no control character may come out."""
    import sys

    from leeway.cli import main

    templates = folder / "templates.yaml"
    templates.write_text(json.dumps([{"name": "a", "template": PAYLOADS[18] + "{prompt}", "origin": PAYLOADS[20]}]))
    commands = [
        ["ledger", str(finished)],
        ["gate", str(finished), "--rule", str(folder / "rule.yaml"), "--out", str(folder / "gated")],
        ["compare", str(finished), str(folder / "run"), "--out", str(folder / "compared")],
        ["attacks", "--templates", str(templates)],
        ["attacks", "a", "--templates", str(templates)],
        ["plan", f"{folder}/no{PAYLOADS[18]}"],
        ["show", str(finished / "study.yaml"), f"name={PAYLOADS[18]}"],
        ["cache", str(finished)],
        ["report", f"{folder}/{PAYLOADS[20]}"],
    ]
    for command in commands:
        out, before = io.StringIO(), sys.argv
        sys.argv = ["leeway", *command]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
            main()
        sys.argv = before
        strange = CONTROL.findall(out.getvalue())
        yield _judged(
            not strange, f"leeway {command[0]}: control characters", repr((strange[:4], out.getvalue()[:300]))
        )
        yield _judged("internal error" not in out.getvalue(), f"leeway {command[0]}: an internal error", out.getvalue())


def _inspect(finished: Path, folder: Path) -> Findings:
    """Export, and read back: every answer is the row's own text."""
    from inspect_ai.log import read_eval_log

    from leeway.integrations.inspect.export import export

    shutil.rmtree(folder / "inspect", ignore_errors=True)
    paths = export(finished, folder / "inspect")
    outside = [p for p in paths if p.parent != folder / "inspect"]
    yield _judged(not outside, "a log outside the folder", str(outside))
    answers = set(pd.read_parquet(finished / "rows.parquet")["response"].dropna())
    for path in paths:
        log = read_eval_log(str(path))
        texts = {s.output.completion for s in log.samples or []}
        yield _judged(texts <= answers, f"{path.name[:60]}: another text")


def _redacted(finished: Path, folder: Path) -> Findings:
    from leeway.report.exports.redacted import publish

    shutil.rmtree(folder / "redacted", ignore_errors=True)
    page = publish(finished, folder / "redacted")
    rows = pd.read_parquet(page.parent / "rows.parquet")
    jailbreak = rows[rows["eval"] == "jailbreak"]
    yield _judged(not jailbreak["response"].fillna("").str.contains(MARK).any(), "an answer is left")
    yield _judged(not jailbreak["judge_raw"].fillna("").str.contains(MARK).any(), "a judge's text is left")


def _compared(finished: Path, folder: Path, browser: str | None) -> Findings:
    from leeway.report.compare.compare import compare, write

    yield from _html(write(compare([folder / "run", finished]), folder / "compared"), browser)


def _messages() -> Findings:
    from leeway.errors import LeewayError

    for text in PAYLOADS:
        yield _judged(not CONTROL.search(str(LeewayError(text, fix=text))), "a message", repr(text))
