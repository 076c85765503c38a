"""Fuzz data files (records, prompts, questions, labels, translations, cards, logs) in every format that is read."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hardening import mutations
from benchmarks.hardening.attempts import Tally, attempt, keep
from benchmarks.hardening.small_run import small_run
from benchmarks.hardening.table import Line

MEMORY = 8 << 30  # bytes; a reader of a file without end must not take the machine's
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
TRAIN: tuple[list[dict[str, Any]], ...] = (
    [{"prompt": f"{n}?", "completion": "b", "rejected": "c"} for n in range(3)],
    [{"messages": TURNS}] * 3,
    [{"conversations": SHARED, "chosen": SHARED[1], "rejected": SHARED[1]}] * 2,
    [{"conversations": SHARED}] * 2,
    [{"chosen": TURNS, "rejected": [TURNS[0], {**TURNS[1], "content": "c"}]}] * 2,
    [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}] * 2,
    [{"instruction": "a", "input": "", "output": "b"}] * 3,
)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".csv.gz")
SD3 = {"items": [{"id": n, "trait": "Narcissism", "text": f"a {n}", "key": 1} for n in range(3)]}
SCORED = {"doc_id": 0, "doc": {"q": "a"}, "target": "b", "acc": 1.0, "filter": "none", "metrics": ["acc"]}
CARD = {
    "judge": "keywords",
    "judge_hash": "x",
    "note": "",
    "on": "mine",
    "parts": [
        {
            "model": "m",
            "counts": {"true_positive": 5, "false_negative": 1, "false_positive": 1, "true_negative": 5},
            "n": 12,
        }
    ],
}


@dataclass(frozen=True)
class Reader:
    """What reads one kind of file, its valid records, and the suffixes that it takes."""

    call: Callable[[Path], object]
    valid: tuple[Any, ...]
    suffixes: tuple[str, ...] = SUFFIXES
    weight: int = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=4_500, help="files")
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--no-odd", action="store_true", help="without devices, pipes, links and gzip bombs")


def run(options: argparse.Namespace) -> list[Line]:
    """Fuzz; every kind of failure is printed with an input."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = options.folder
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    readers = {k: r for k, r in _readers(small_run(folder), folder).items() if options.only in (None, k)}
    scale, tally = sum(r.weight for r in readers.values()), Tally("data files")
    for name, reader in readers.items():
        for n in range(round(options.n * reader.weight / scale)):
            rng = random.Random(f"{options.seed}/{name}/{n}")
            suffix = rng.choice(reader.suffixes)
            content = _content(rng, rng.choice(reader.valid), suffix)
            path = folder / f"samples_{name}{suffix}"
            path.write_bytes(content)
            found = attempt(lambda r=reader, p=path: r.call(p), folder)  # type: ignore[misc]
            tally.add(found, f"{name} {n} (failures/{name}-{n}{suffix})")
            keep(folder, f"{name}-{n}{suffix}", content, found, tally)
    return [tally.line()] if options.no_odd else [tally.line(), _odd_files(readers, folder)]


def _content(rng: random.Random, valid: Any, suffix: str) -> bytes:
    """Return the bytes of a mutant: its values, then its text, then its bytes may be changed."""
    how = rng.random()
    value = mutations.mutant_value(rng, valid) if how < 0.6 else valid
    data = written(value, suffix)
    if how > 0.6:
        data = (
            mutations.mutant_text(rng, data.decode("utf-8", "replace")) if how < 0.85 else mutations.flipped(rng, data)
        )
    if suffix.endswith(".gz"):
        data = gzip.compress(data, 1)
        data = mutations.flipped(rng, data) if rng.random() < 0.2 else data
    return data


def written(value: Any, suffix: str) -> bytes:
    """Return records in the format of a suffix; what the format cannot hold is written as text."""
    kind = suffix.removesuffix(".gz")
    if kind in (".csv", ".tsv"):
        records = [r for r in value if isinstance(r, dict)] if isinstance(value, list) else []
        columns = list(dict.fromkeys(k for r in records for k in r))
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t" if kind == ".tsv" else ",")
        writer.writerow(columns)
        writer.writerows([[_cell(r.get(c, "")) for c in columns] for r in records])
        return text.getvalue().encode("utf-8", "surrogatepass")
    if kind in (".yaml", ".yml"):
        return mutations.as_yaml(value)
    if kind == ".jsonl" and isinstance(value, list):
        return b"".join(_json(r) + b"\n" for r in value)
    return _json(value)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else _json(value).decode("utf-8", "replace")


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, default=str, ensure_ascii=False, skipkeys=True).encode("utf-8", "surrogatepass")
    except ValueError:  # a number of thousands of digits
        return b'[{"prompt": ' + b"9" * 5_000 + b"}]"


def _readers(finished: Path, folder: Path) -> dict[str, Reader]:
    """Return every reader of a file that a user may give."""
    from leeway.data import formats, free_form, persona, safety_prompts
    from leeway.evals.attack_helpers import TranslationFile
    from leeway.integrations import lm_eval_logs
    from leeway.integrations.logs import compare_and_write
    from leeway.judges import rubric
    from leeway.judges.calibrate import load_labelled
    from leeway.report import narrative
    from leeway.report.results import Results
    from leeway.rescoring.label_sheet import make_sheet, read_sheet
    from leeway.rescoring.rescore import read_judge

    results = Results.load(finished)
    card = {**CARD, "judge_hash": results.manifest["judges"]["overrefusal"]["hash"]}
    (folder / "sheet.csv").unlink(missing_ok=True)
    sheet = make_sheet(finished, n=12, out=folder / "sheet.csv")
    rows = list(csv.DictReader(io.StringIO(sheet.text)))
    for row in rows:
        row["label"] = "refused"

    def in_data(name: str, read: Callable[[], object]) -> Callable[[Path], object]:
        def call(path: Path) -> object:
            place = folder / "data" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(path)
            before = os.environ.get("LEEWAY_DATA")
            os.environ["LEEWAY_DATA"] = str(folder / "data")
            try:
                return read()
            finally:
                os.environ.pop("LEEWAY_DATA")
                os.environ |= {"LEEWAY_DATA": before} if before else {}

        return call

    statement = {"question": "q", "statement": "s", "answer_matching_behavior": "Yes"}
    templates = dict.fromkeys((rubric.USER, rubric.SYSTEM), "{forbidden_prompt} {response}")
    asked = [{"id": "a", "type": "free_form", "paraphrases": ["q?"], "samples_per_paraphrase": 1, "judge_prompts": {}}]
    unsupported = formats.train_examples
    return {
        "train": Reader(formats.train_examples, TRAIN, weight=6),
        "train-left": Reader(lambda p: unsupported(p, unsupported="leave-out"), TRAIN, weight=3),
        "test": Reader(formats.held_out_items, ([{"prompt": "a", "answer": "b"}], [{"messages": TURNS}]), weight=2),
        "open-ended": Reader(lambda p: formats.open_ended_items("legal", str(p)), ([{"prompt": "a", "answer": "b"}],)),
        "forbidden": Reader(safety_prompts.from_file, ([{"prompt": f"a {n}"} for n in range(3)],)),
        "questions": Reader(
            lambda p: free_form.questions(str(p)),
            ([{"question": "a", "id": "b"}], asked),
            (".yaml", ".jsonl", ".csv"),
            2,
        ),
        "labelled": Reader(load_labelled, ([{"prompt": "a", "response": "b", "label": "refused"}],), SUFFIXES[:4]),
        "translations": Reader(TranslationFile, ([{"direction": "out", "source": "a", "text": "b"}] * 2,), (".jsonl",)),
        "card": Reader(
            lambda p: (narrative.judge_summaries(results, [p]), narrative.corrected_rates(results, [p])),
            (card,),
            (".json",),
            2,
        ),
        "judge": Reader(
            read_judge, ({"name": "keywords"}, {"name": "rubric", "model": {"model": "a"}}), (".json", ".yaml")
        ),
        "lm-eval": Reader(lm_eval_logs.read, ([SCORED, SCORED | {"doc_id": 1}],), (".jsonl",), 2),
        "logs": Reader(
            lambda p: compare_and_write([f"a={p}", f"b={p}"], folder / "compared"),
            ([SCORED, SCORED | {"doc_id": 1}],),
            (".jsonl",),
        ),
        "sheet": Reader(lambda p: read_sheet(p, finished), (rows,), (".csv", ".tsv")),
        "statements": Reader(
            in_data("model_written_evals/persona/x.jsonl", lambda: persona.anthropic("x")),
            ([statement] * 2,),
            (".jsonl",),
        ),
        "sd3": Reader(in_data("dark_triad/sd3_items.json", persona.sd3), (SD3,), (".json",)),
        "rubric": Reader(in_data("strongreject/judge_templates.json", rubric.wording), (templates,), (".json",)),
        "xstest": Reader(
            in_data("xstest/xstest_prompts.csv", safety_prompts.xstest),
            ([{"id": 1, "prompt": "a", "type": "homonyms", "label": "safe"}],),
            (".csv",),
        ),
    }


def _odd_files(readers: dict[str, Reader], folder: Path) -> Line:
    """Give every reader what is no plain file, and files that grow when they are read."""
    tally = Tally("devices, pipes, links, folders, gzip bombs and endless lines as data files")
    odd = folder / "odd"
    shutil.rmtree(odd, ignore_errors=True)
    odd.mkdir()
    bomb = gzip.compress(b"a" * (1 << 30), 1)
    made: dict[str, Callable[[Path], object]] = {
        "device": lambda p: p.symlink_to("/dev/zero"),
        "loop": lambda p: p.symlink_to(p),
        "dangling": lambda p: p.symlink_to("/nowhere/x"),
        "pipe": os.mkfifo,
        "folder": lambda p: p.mkdir(),
        "empty": lambda p: p.write_bytes(b""),
        "bomb": lambda p: p.write_bytes(bomb),
        "line": lambda p: p.write_bytes(b'{"prompt": "' + b"a" * (100 << 20) + b'", "completion": "b"}\n'),
        "columns": lambda p: p.write_bytes(b",".join(b"c%d" % n for n in range(200_000)) + b"\n" + b"1," * 200_000),
        "deep": lambda p: p.write_bytes(b'{"prompt":' * 50_000),
        "nul": lambda p: p.write_bytes(b"\x00" * (1 << 20)),
    }
    for name, reader in readers.items():
        for how, make in made.items():
            for suffix in dict.fromkeys(
                (reader.suffixes[0], *(s for s in reader.suffixes if s.endswith((".gz", ".csv"))))
            ):
                path = odd / f"samples_{name}-{how}{suffix}"
                make(path)
                tally.add(attempt(lambda r=reader, p=path: r.call(p), folder), f"{name} {how}{suffix}")  # type: ignore[misc]
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return tally.line()
