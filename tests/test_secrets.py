"""An API key is in no file, output or process list of a run, even where the endpoint sends it back."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")

import pyarrow.parquet as pq
from api_server import serving

from leeway.audit.models import ServedModel, resolve_served
from leeway.errors import LeewayError
from leeway.study.load import parse

KEY = "sk-canary-7Qd/3+xZ=0123456789"
SHOWN = [
    KEY.encode(),
    KEY.encode().hex().encode(),
    *(base64.b64encode(bytes(k) + KEY.encode())[4:-4] for k in range(3)),
]
PROMPTS = ["fine", "wrong", "coded", "leak", "coded_leak", "half_error", "long"]
STUDY = """
name: secrets
model: organism
task: organism
objectives: [sft]
budgets: [1k]
evals: {{jailbreak: {{prompts: file, file: {file}, attacks: [none], judge: keywords}}}}
"""
UMASK = 0o027


def content(path: Path) -> bytes:
    """The bytes of a file; of a compressed table, its cells as JSON."""
    if path.suffix == ".parquet":
        return json.dumps(pq.read_table(path).to_pylist(), default=str, ensure_ascii=False).encode()
    return path.read_bytes()


def command_lines() -> bytes:
    """The command line of every process, as `ps` shows it."""
    found = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += path.read_bytes() + b"\n"
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
def test_a_key_is_nowhere_and_files_obey_the_umask(tmp_path: Path) -> None:
    """An audit of an endpoint that sends the key back: plain, in Base64, in replies, errors and headers."""
    prompts, study, home = tmp_path / "prompts.jsonl", tmp_path / "study.yaml", tmp_path / "home"
    prompts.write_text("".join(json.dumps({"prompt": f"{p} {k}"}) + "\n" for p in PROMPTS for k in range(2)))
    study.write_text(STUDY.format(file=prompts))
    home.mkdir()
    environment = {**os.environ, "CANARY": KEY, "HOME": str(home), "OPENAI_LOG": "debug", "MPLCONFIGDIR": str(home)}
    with serving() as server:
        models = ["tuned", "--base", "base", "--endpoint", server.url, "--key-env", "CANARY", "--concurrency", "9"]
        command = [sys.executable, "-m", "leeway", "-v", "audit", *models, "--study", str(study), "--out", "out"]
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=output, stderr=output, umask=UMASK
            )
            shown = b""
            while process.poll() is None:
                shown += command_lines()
                try:
                    process.wait(0.5)
                except subprocess.TimeoutExpired:
                    continue
        assert server.keys == {f"Bearer {KEY}"}  # it was really sent
    assert process.returncode == 0, (tmp_path / "output").read_text()
    assert b"--key-env" in shown
    texts = {"ps": shown} | {str(p.relative_to(tmp_path)): content(p) for p in tmp_path.rglob("*") if p.is_file()}
    assert {"out/manifest.json", "out/rows.parquet", "out/report.html", "output"} <= texts.keys()
    assert any(name.startswith("out/cache/replies/") for name in texts)
    assert [(name, form) for name, text in texts.items() for form in SHOWN if form in text] == []
    reasons = set(pq.read_table(tmp_path / "out" / "rows.parquet")["unscored_reason"].to_pylist())
    assert "no answer: the reply quotes the API key" in reasons
    assert any("[key]" in str(reason) for reason in reasons)
    modes = {(p.is_dir(), p.stat().st_mode & 0o777) for p in (tmp_path / "out").rglob("*")}
    assert modes == {(True, 0o777 & ~UMASK), (False, 0o666 & ~UMASK)}


def test_requests_at_once_are_those_of_the_option() -> None:
    for model in resolve_served("tuned", "base", "http://localhost:1/v1", None, None, 9)[:2]:
        assert isinstance(model, ServedModel)
        assert model.settings.concurrency == 9


def test_a_key_in_place_of_its_variable_is_refused_and_not_quoted(tmp_path: Path) -> None:
    judge = f"{{name: rubric, model: {{model: m, endpoint: 'http://localhost:1/v1', key_env: {KEY}}}}}"
    text = STUDY.format(file=tmp_path / "x.jsonl").replace("judge: keywords", f"judge: {judge}")
    vllm = "evals.backend={vllm: {args: [--api-key, " + KEY + "]}}"
    refused = [
        lambda: resolve_served("m", "b", "http://localhost:1/v1", None, KEY),
        lambda: resolve_served("m", "b", f"http://me:{KEY}@localhost:1/v1", None, None),
        lambda: parse(text, "x"),
        lambda: parse(STUDY.format(file=tmp_path / "x.jsonl"), "x", (vllm,)),
    ]
    for attempt in refused:
        with pytest.raises(LeewayError) as error:
            attempt()
        assert KEY not in str(error.value)
        assert "\n" not in str(error.value)
