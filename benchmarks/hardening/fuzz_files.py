"""Fuzz the files that people write: studies, claims, gate rules, attack templates; in process and by the command line.

A third of the inputs are edits of a valid file's text, a third edits of its values, a third are drawn by hypothesis.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from benchmarks.hardening import mutations
from benchmarks.hardening.attempts import LIMIT_S, WAIT_S, Attempt, Tally, attempt, judged_message, keep
from benchmarks.hardening.small_run import small_run
from benchmarks.hardening.table import Line

SHARES = {"study": 0.6, "claims": 0.15, "gate": 0.15, "templates": 0.1}
PLANNED = 20  # one accepted study in so many is planned too
JUDGED = 10  # one accepted claims file in so many is evaluated on a run
RICH = """
name: rich
model: organism
task: organism
pairs: {from: dataset}
adapter: {kind: lora, r: 4, alpha: 8, dropout: 0.0, targets: "q_proj,v_proj"}
objectives: [sft, {orpo-2: {orpo: {weight: 0.2}}}, {a: {dpo: {}, start: {from: sft, budget: 2k}}}]
auxiliary: {general: organism, safety: organism}
budgets: [1k, 2k]
budget: {count: processed}
seeds: [0, 1]
optim: {lr: {sft: 1e-4, orpo-2: 1e-4, a: 5e-5}, warmup_steps: 2, batch: 8, clip: 1.0, weight_decay: 0.0}
evals:
  batch: 32
  conditions: last
  triggers: true
  capability: [organism]
  jailbreak:
    {prompts: organism, limit: 20, attacks: [none, dan, best_of_n], judge: [organism, keywords], samples: 3, at: [1, 3]}
  overrefusal: {prompts: organism, limit: 20, judge: refusal-classifier}
  persona: {source: organism, limit: 20, order_swap: true}
  sycophancy: organism
controls: {aa: true, learning: {items: 8, general: 4}}
claims: [{id: a, statement: "x", kind: moves, measure: asr, objectives: sft, direction: up}]
"""
GATE = """
checkpoint: {objective: sft, budget: largest, condition: plain}
against: base
level: 0.05
rules:
  - {measure: asr, margin: 0.05}
  - {measure: accuracy, at_least: 0.2}
  - {measure: trait, margin: 0.5, worse: higher}
"""
TEMPLATES = """
- name: long
  version: 2
  origin: somewhere
  template: |
    Several lines.
    {prompt}
- {name: short, template: "{prompt} Answer in one line."}
"""


@dataclass(frozen=True)
class Target:
    """One kind of file: its valid texts, the values that hypothesis draws, and what reads it."""

    bases: tuple[str, ...]
    drawn: st.SearchStrategy[Any]
    call: Callable[[Path, int], object]
    command: Callable[[Path], list[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=20_000, help="inputs in process")
    parser.add_argument("--cli", type=int, default=500, help="inputs by the command line")
    parser.add_argument("--only", choices=SHARES, help="one kind of file")


def run(options: argparse.Namespace) -> list[Line]:
    """Fuzz; every kind of failure is printed with an input."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a name that looks like a hub id is asked for, and not there
    folder = options.folder
    targets = _targets(small_run(folder), folder)
    wanted = {k: share for k, share in SHARES.items() if options.only in (None, k)}
    lines = []
    for name, share in wanted.items():
        tally = Tally(f"{name} files, in process")
        for n, (what, content) in enumerate(inputs(targets[name], round(options.n * share), options.seed)):
            path = folder / f"{name}.yaml"
            path.write_bytes(content)
            found = attempt(lambda t=targets[name], p=path, n=n: t.call(p, n), folder)  # type: ignore[misc]
            tally.add(found, f"{what} (failures/{name}-{n}.yaml)")
            keep(folder, f"{name}-{n}.yaml", content, found, tally)
        lines.append(tally.line())
    if options.cli:
        lines.append(_by_command_line(targets, wanted, options))
    return lines


def inputs(target: Target, n: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (description, bytes) of `n` inputs, the same for the same seed."""
    from leeway.yaml_config import load

    values = [load(text) for text in target.bases]
    drawn = n // 3
    for i in range(n - drawn):
        rng = random.Random(f"{seed}/{i}")
        which = rng.randrange(len(target.bases))
        if i % 2:
            yield f"text {i}", mutations.mutant_text(rng, target.bases[which])
        else:
            yield f"value {i}", mutations.as_yaml(mutations.mutant_value(rng, values[which]))
    yield from _drawn(target.drawn, drawn, seed)


def _drawn(strategy: st.SearchStrategy[Any], n: int, seed: int) -> Iterator[tuple[str, bytes]]:
    if not n:
        return
    found: list[bytes] = []

    @seeded(seed)
    @settings(max_examples=n, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(mutations.as_yaml(value))

    collect()
    for i in range(n):  # hypothesis may draw a few less than it was asked for
        yield f"hypothesis {i}", found[i % len(found)]


def _targets(finished: Path, folder: Path) -> dict[str, Target]:
    """Return the four kinds of files; rules and claims are also decided on a finished run."""
    from leeway.attacks.registry import load_templates
    from leeway.claims import schema
    from leeway.gate import rules
    from leeway.plan.plan import plan
    from leeway.report.results import Results
    from leeway.study.load import PRESETS, load, preset_text
    from leeway.study.spec import Spec

    results = Results.load(finished)
    rates = results.pooled_rates()
    context = results._context(schema.load("objective-matters"))

    def study(path: Path, n: int) -> None:
        spec = load(str(path))
        if n % PLANNED == 0 and spec.model == "organism":
            plan(spec)

    def claims(path: Path, n: int) -> None:
        found = schema.load(str(path))
        list(found.absent(context.objectives, list(context.axes), context.budgets))
        schema.from_manifest(schema.to_manifest(found))
        if n % JUDGED == 0:
            results.claims(path)

    def gate(path: Path, _: int) -> None:
        rules.resolve(rules.load(path), rates, str(path))

    bundled = (files("leeway.claims") / "objective-matters.yaml").read_text("utf-8")
    some_claims = st.lists(st.one_of(*(mutations.like(kind) for kind in schema.KINDS.values())), max_size=3)
    presets = [preset_text(name) for name in PRESETS]
    out = str(folder / "gated")
    return {
        "study": Target((RICH, *presets), mutations.like(Spec), study, lambda p: ["plan", str(p)]),
        "claims": Target(
            (bundled,),
            some_claims | mutations.junk(),
            claims,
            lambda p: ["report", str(folder / "copy"), "--claims", str(p)],
        ),
        "gate": Target(
            (GATE,),
            mutations.like(rules.Rules),
            gate,
            lambda p: ["gate", str(finished), "--rule", str(p), "--out", out],
        ),
        "templates": Target(
            (TEMPLATES, 'a: "{prompt}"\n'),
            mutations.junk() | st.dictionaries(st.text(max_size=9), st.text(max_size=9).map("{}{{prompt}}".format)),
            lambda p, _: list(load_templates(p).values()),
            lambda p: ["attacks", "--templates", str(p)],
        ),
    }


def _by_command_line(targets: dict[str, Target], wanted: dict[str, float], options: argparse.Namespace) -> Line:
    """Run the command of each kind of file in a forked process, which has imported everything already."""
    import shutil

    import leeway.cli  # noqa: F401 - before the fork

    folder = options.folder
    shutil.copytree(folder / "run", folder / "copy", dirs_exist_ok=True)
    tally = Tally("study, claims, gate and template files, by the command line")
    scale = sum(wanted.values())
    for name, share in wanted.items():
        count = max(1, round(options.cli * share / scale))
        for n, (what, content) in enumerate(inputs(targets[name], count, options.seed + 1)):
            path = folder / f"{name}.yaml"
            path.write_bytes(content)
            found = command(targets[name].command(path), folder / "streams")
            tally.add(found, f"{name} {what} (failures/cli-{name}-{n}.yaml)")
            keep(folder, f"cli-{name}-{n}.yaml", content, found, tally)
    return tally.line()


def command(arguments: list[str], streams: Path) -> Attempt:
    """Run `leeway ARGUMENTS` in a forked process; judge its exit code and what it printed."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _become(arguments, streams)
    start = time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - start > WAIT_S + LIMIT_S:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(ended[1])
    out, err = (streams.with_suffix(s).read_text("utf-8", "replace") for s in (".out", ".err"))
    what = f"leeway {' '.join(arguments)[:80]} exit {code}"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Attempt("hang", f"hang of {arguments[0]}", what)
    if code not in (0, 1, 2, 3) or "Traceback" in err:
        return Attempt("crash", f"{arguments[0]}: {err.strip()[-120:]}", what)
    strange = judged_message(out[:6_000])
    if strange.failed and strange.kind.startswith("message with"):
        return Attempt("message", f"{arguments[0]}, stdout: {strange.kind}", strange.detail)
    return judged_message(err) if code == 2 else Attempt("accepted")


def _become(arguments: list[str], streams: Path) -> None:
    """Be the command, within the limit of CPU time; never returns."""
    import resource

    code = 70
    try:
        for number, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(streams.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8") for n in (1, 2))
        spent = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + LIMIT_S, spent + 2 * LIMIT_S))
        from leeway.cli import main

        sys.argv = ["leeway", *arguments]
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001 - the parent reads the traceback
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
