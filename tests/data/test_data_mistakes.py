"""Mistakes in data files, paths and numbers: each is one line that names the file, the record or the setting."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from leeway.data import readers
from leeway.data.formats import held_out_items, train_examples
from leeway.data.readers import read
from leeway.errors import LeewayError
from leeway.io import expand
from leeway.study.load import parse
from leeway.study.prepare import prepare
from leeway.study.prepare import train_examples as train_on

GOOD = {"prompt": "a", "completion": "b"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
STUDY = """
name: x
model: {model}
device: cpu
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: [sft]
budgets: [200]
optim: {{batch: 4}}
evals: {{capability: [{{name: files, max_new_tokens: 4}}]}}
"""
ORGANISM = """
name: x
model: organism
task: organism
objectives: [sft]
budgets: [200]
evals: {{{evals}}}
"""


def refused(do: Callable[[], object]) -> str:
    """The one line of the mistake that `do` raises."""
    with pytest.raises(LeewayError) as found:
        do()
    line = str(found.value)
    assert "\n" not in line
    return line


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def study(models: dict[str, Path], tmp_path: Path) -> str:
    write(tmp_path / "train.jsonl", *({"prompt": f"{a}?", "completion": "b"} for a in range(8)))
    write(tmp_path / "test.jsonl", {"prompt": "3?", "answer": "3"})
    return STUDY.format(model=models["llama"], root=tmp_path)


@pytest.mark.parametrize(
    ("first", "column"),
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": SHARED}, "conversations"),
        ({"chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": "c"}]}, "chosen"),
    ],
)
def test_a_later_record_without_the_column(first: object, column: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", first, {"text": "x"})
    line = refused(lambda: train_examples(path))
    assert line == f"{path}, record 2: no {column} in it (it has: text); correct that record"


@pytest.mark.parametrize("spelled", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("column", ["prompt", "completion", "rejected"])
def test_a_missing_text_written_as_nan(column: str, spelled: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "rejected": "c", column: float(spelled)}) + "\n")
    assert spelled in path.read_text()
    assert f"a.jsonl, record 2: its {column} is " in refused(lambda: train_examples(path))


def test_a_missing_answer_written_as_nan(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "answer": float("nan")})
    assert "a.jsonl, record 1: its answer is nan, not text" in refused(lambda: held_out_items(path))


def test_a_corrupt_gzip_file(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({**GOOD, "prompt": str(n)}) + "\n" for n in range(50)).encode())
    path = tmp_path / "a.jsonl.gz"
    for at in range(12, len(whole) - 8, 7):  # within the compressed data, after the header
        path.write_bytes(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
        line = refused(lambda: list(read(path)))
        assert str(path) in line
    path.write_bytes(whole[:30] + b"\xff\xff\xff\xff" + whole[34:])
    assert "a.jsonl.gz: broken gzip file (" in refused(lambda: list(read(path)))


def test_a_byte_order_mark_within_a_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()))
    assert list(read(path)) == [GOOD]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n', "a.jsonl, line 2: 'prompt' is given twice"),
        ("a.json", '[{"a": {"b": 1, "b": 2}}]', "a.json: 'b' is given twice"),
        ("a.csv", "prompt,answer,prompt\n1,2,3\n", "a.csv, line 1: column 'prompt' is given twice"),
        ("a.tsv", "prompt\tprompt\n", "a.tsv, line 1: column 'prompt' is given twice"),
    ],
)
def test_a_key_or_a_column_that_is_repeated(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert words in refused(lambda: list(read(tmp_path / name)))


def test_hundreds_of_thousands_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"c{n}" for n in range(200_000)) + "\n" + "1," * 199_999 + "1\n")
    line = refused(lambda: train_examples(tmp_path / "a.csv"))
    assert "c48, c49, …)" in line
    assert len(line) < 1_000


@pytest.mark.parametrize(
    ("text", "words"),
    [("[" * 100_000, "nested too deep"), ('{"prompt": ' + "9" * 5_000 + "}", "a number with too many digits")],
)
def test_json_that_is_nested_or_written_beyond_reason(text: str, words: str, tmp_path: Path) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text(json.dumps(GOOD) + "\n" + text + "\n")
    whole.write_text(text if text.startswith("[") else f"[{text}]")
    assert f"a.jsonl, line 2: {words}" in refused(lambda: list(read(lines)))
    assert f"a.json: {words}" in refused(lambda: list(read(whole)))
    cell = write(tmp_path / "b.jsonl", {"prompt": "[{" + "[" * 100_000, "completion": "b"})
    assert len(train_examples(cell)[0]) == 1  # text that only begins like a list of turns


def test_a_limit_above_the_number_of_training_examples(study: str) -> None:
    line = refused(lambda: train_on(parse(study, "x", ("task.limit=9",))))
    assert line.startswith("task.limit: 9 is more than the 8 training examples (")
    assert len(train_on(parse(study, "x", ("task.limit=8",)))[0]) == 8


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_nothing_to_train_on(content: str, study: str, tmp_path: Path) -> None:
    name = "train.json" if content == "[]" else "train.jsonl"
    (tmp_path / name).write_text(content)
    line = refused(lambda: prepare(parse(study.replace("train.jsonl", name), "x")))
    assert line == f"task: no example to train on in {tmp_path}/{name}; check the training file"


def test_no_example_fits_the_context(study: str, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *({"prompt": f"{a} " * 3_000, "completion": "b"} for a in range(8)))
    line = refused(lambda: prepare(parse(study, "x", ("task.too_long=leave-out",))))
    assert "task: none of its 8 examples fits the context of" in line


@pytest.mark.parametrize(
    "override",
    [
        "task={files: {train: ~nosuchuser/x.jsonl, test: a}}",
        "model=~nosuchuser/m",
        "objectives=[{a: {sft: {}, start: {adapter: ~nosuchuser/x}}}]",
        "claims=~nosuchuser/x.yaml",
        "evals={jailbreak: {prompts: file, file: ~nosuchuser/x.jsonl}}",
        "evals={jailbreak: {prompts: organism, templates: ~nosuchuser/x.yaml, attacks: [a]}}",
        "evals={jailbreak: {prompts: organism, attacks: [zulu], translator: {from: cache, file: ~nosuchuser/x.jsonl}}}",
    ],
)
def test_a_home_folder_of_nobody(override: str, study: str) -> None:
    line = refused(lambda: prepare(parse(study, "x", (override,))))
    assert "no home folder for ~nosuchuser; write the path in full" in line


def test_a_home_folder_of_somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (expand("~/a"), expand("b/~c")) == (tmp_path / "a", Path("b/~c"))


@pytest.mark.parametrize(
    ("evals", "words"),
    [
        ("persona: {source: organism, traits: [narcisism]}", "no trait 'narcisism'; did you mean 'narcissism'?"),
        (
            "persona: {source: organism, limit: 5000}",
            "402 machiavellianism items, and limit is 5,000; set limit to 402",
        ),
        ("capability: [{name: organism, limit: 5000}]", "4,416 capability items, and limit is 5,000"),
        ("jailbreak: {prompts: organism, limit: 50000}", "5,760 forbidden prompts, and limit is 50,000"),
        ("overrefusal: {prompts: organism, limit: 50000}", "7,008 benign prompts near the line, and limit is 50,000"),
    ],
)
def test_more_than_the_organism_has(evals: str, words: str) -> None:
    assert words in refused(lambda: prepare(parse(ORGANISM.format(evals=evals), "x")))


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=1e300",
        "optim.lr={sft: 1e39}",
        "optim={lr: tuned, tune: {lrs: [1e300]}}",
        "optim.clip=1e300",
        "optim.weight_decay=1e300",
        "optim.warmup_steps=100000000000000000000",
        "optim.micro_tokens=100000000000000000000",
        "adapter.r=1e20",
        "adapter.r=100000000",
        "adapter.alpha=1e300",
        "threads=100000",
        f"threads=0x{'f' * 5000}",
        "processes=1000",
        "evals.batch=100000000000000000000",
        "budgets=[1e300]",
        f"budgets=['{'9' * 5000}']",
        f"budgets=['{'9' * 400}.5M']",
        "auxiliary.general={from: organism, limit: 100000000000}",
    ],
)
def test_numbers_beyond_reason(override: str, study: str) -> None:
    key = override.partition("=")[0]
    line = refused(lambda: parse(study, "x", (override,)))
    assert key in line
    assert len(line) < 400


def test_half_a_character_inside_turns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a\\ud800"}, {"role": "assistant", "content": "b"}]}\n')
    assert "a.jsonl, record 1: its messages holds \\ud800, one half of a character" in refused(lambda: list(read(path)))
    path.write_text('{"a\\udfff": 1}\n')
    assert "a.jsonl, record 1: a key holds \\udfff" in refused(lambda: list(read(path)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.json"])
def test_a_line_or_a_file_that_grows_without_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 1 << 12)
    monkeypatch.setattr(readers, "MAX_TEXT", 1 << 12)
    content = b"prompt\n" + b"a" * (1 << 20)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    line = refused(lambda: list(read(tmp_path / name)))
    assert "not JSON" in line or "over " in line
    assert len(line) < 400


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3_000, "a\0b"])
def test_what_no_file_system_takes_as_a_path(name: str, study: str) -> None:
    assert "not a path" in refused(lambda: expand(name))
    train = json.dumps(name)
    assert "not a path" in refused(
        lambda: prepare(parse(study, "x", (f"task={{files: {{train: {train}, test: a}}}}",)))
    )
