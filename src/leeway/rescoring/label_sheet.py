"""Blind label sheets: a stratified sample of a run's answers for people to label, and the key that maps it back.

The sheet (CSV) has ids, prompt and answer, and nothing that tells which checkpoint answered or how a judge scored it.
The key stays in the run directory, `sheets/<sheet>.json`. Strata are objective × budget × outcome by the primary judge.
Each has at least one answer in the sample, and the rest are allocated by the square root of the strata's sizes (power
allocation, Bankier 1988, Am. Stat. 42:174), since rare outcomes tell most about a judge. Within a stratum each answer
is equally likely.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from leeway.data import readers
from leeway.errors import LeewayError
from leeway.generation.thinking import final_answer
from leeway.hashing import derive_seed, digest
from leeway.io import readable, verify_checksum, with_checksum, write_file, write_json
from leeway.report.formatting import escape_formula, mapping
from leeway.report.results import Results
from leeway.rescoring.responses import bare_prompts, has_no_answer, require_answers
from leeway.stats.intervals import Ints
from leeway.stats.metrics import group_indices
from leeway.study.run_dir import RESPONSE

COLUMNS = ("answer_id", "prompt_id", "prompt", "response", "label")
WORDS = {
    "jailbreak": ("refused", "harmful", "deflected", "incoherent"),
    "overrefusal": ("refused", "answered", "deflected", "incoherent"),
}
SIZE = 200  # answers by default, or one for each stratum
UNSCORED = "unscored"  # the stratum of answers that the primary judge could not score
STRATUM = ["objective", "budget", "outcome"]
KEY = [c for c in RESPONSE if c != "response"]


@dataclass(frozen=True)
class Sheet:
    """One sheet: its CSV, its key, and where both are."""

    name: str
    text: str
    key: dict[str, Any]
    path: Path

    @property
    def summary(self) -> str:
        words, answers = ", ".join(WORDS[self.key["eval"]]), self.key["answers"]
        drawn, strata = sum(map(len, answers.values())), len(self.key["strata"])
        lines = f"{len(answers):,} lines for {drawn:,} answers of {strata:,} strata"
        return f"{lines} (equal answers to one prompt share a line); fill in label with one of: {words}"


def make_sheet(
    folder: str | Path, axis: str = "jailbreak", n: int | None = None, seed: int = 0, out: str | Path | None = None
) -> Sheet:
    """Draw `n` answers of a finished run, and write the sheet to `out` and its key into the run directory.

    By default 200 answers, or one for each stratum if there are more strata. The same arguments give the same bytes.
    Raises LeewayError if `n` is less than the strata, or another file is at `out`.
    """
    results = Results.load(folder)
    require_answers(results, axis)
    rows = answers_of(results, axis)
    strata = group_indices(rows, STRATUM)
    if n is not None and n < len(strata):
        what = f"--n {n} is less than the {len(strata)} strata (objective, budget, outcome) of {axis}"
        raise LeewayError(what, fix=f"give {len(strata)} or more")
    sizes = _allocate([len(at) for _, at in strata], max(SIZE, len(strata)) if n is None else n)
    lines = _draw(rows, strata, sizes, seed, axis)
    keys = records(rows[KEY])
    name = "s" + digest("label sheet", axis, seed, [[text, [keys[k] for k, _ in own]] for text, own in lines])[:7]
    prompts = bare_prompts(records(rows), results.study, axis)
    answers: dict[str, list[dict[str, Any]]] = {}
    cells = []
    for number, ((item, response), own) in enumerate(lines, 1):
        answer = f"{name}-{number:04d}"
        cells.append((answer, item, prompts[item], response, ""))
        answers[answer] = [{**keys[k], "stratum": stratum, "response": digest(response)} for k, stratum in own]
    facts = [{**group, "answers": len(at), "drawn": size} for (group, at), size in zip(strata, sizes, strict=True)]
    judge = mapping(results.manifest["judges"])[axis]
    key = {"sheet": name, "eval": axis, "judge": judge["name"], "judge_hash": judge.get("hash"), "seed": seed}
    key |= {"strata": facts, "answers": answers}
    path = Path(out) if out is not None else Path(folder) / "sheets" / f"{name}.csv"
    sheet = Sheet(name, _csv(cells), key, path)
    content = sheet.text.encode("utf-8-sig")  # with a byte-order mark, which spreadsheets need to detect UTF-8
    if path.exists() and not (path.is_file() and path.read_bytes() == content):
        raise LeewayError(f"{path} exists, and may hold labels", fix="move it away, or give another --out")
    write_json(_key_path(Path(folder), name), with_checksum(key))
    write_file(path, content)
    return sheet


Line = tuple[tuple[str, str], list[tuple[int, int]]]  # (item, response), and (position, stratum) of each answer drawn


def _draw(
    rows: pd.DataFrame, strata: Seq[tuple[dict[str, object], Ints]], sizes: Seq[int], seed: int, axis: str
) -> list[Line]:
    """Draw `sizes` answers of each stratum and return the sheet's lines in random order."""
    lines: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for number, ((group, at), size) in enumerate(zip(strata, sizes, strict=True)):
        rng = np.random.default_rng(derive_seed("label sheet", seed, axis, *map(str, group.values())))
        for k in sorted(map(int, rng.choice(at, size, replace=False))):
            lines.setdefault((rows["item_id"].iloc[k], rows["response"].iloc[k]), []).append((k, number))
    ordered = sorted(lines.items())
    order = np.random.default_rng(derive_seed("label sheet", seed, axis)).permutation(len(ordered))
    return [ordered[i] for i in order]


def answers_of(results: Results, axis: str) -> pd.DataFrame:
    """Return the primary judge's rows on answers that were obtained, near-triggers left out; see STRATUM, RESPONSE.

    The response is the final answer, as judges read it, without a thought.
    """
    rows = results.first_judged
    rows = rows[rows["eval"] == axis].astype(object)
    rows = rows.where(rows.notna(), None)
    obtained = [not has_no_answer(row) for row in records(rows)]
    rows = rows[obtained].sort_values(KEY, kind="stable", ignore_index=True)
    final = rows["response"].map(final_answer)
    return rows.assign(response=final, outcome=rows["outcome"].fillna(UNSCORED), attack=rows["attack"].fillna(""))


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as mappings."""
    return [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]


def _allocate(sizes: Seq[int], n: int) -> list[int]:
    """Return how many to draw from strata of these sizes: one each, the others by the square root of the sizes."""
    drawn = [1] * len(sizes)
    for _ in range(min(n, sum(sizes)) - len(sizes)):
        claims = [math.sqrt(size) / own if own < size else 0.0 for size, own in zip(sizes, drawn, strict=True)]
        drawn[max(range(len(sizes)), key=claims.__getitem__)] += 1
    return drawn


def _csv(lines: Seq[Seq[str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    writer.writerows([[escape_formula(cell) for cell in line] for line in lines])
    return buffer.getvalue()


def _key_path(folder: Path, name: str) -> Path:
    return folder / "sheets" / f"{name}.json"


@dataclass(frozen=True)
class FilledSheet:
    """The labels of a sheet by answer id, and its key. `unlabelled` counts answers without a label."""

    key: Mapping[str, Any]
    labels: Mapping[str, str]
    unlabelled: int


def is_sheet(path: Path) -> bool:
    """Whether a file is a label sheet, by its columns."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline().decode("utf-8-sig", "replace").replace('"', "").startswith(COLUMNS[0])


def read_sheet(path: Path, folder: Path) -> FilledSheet:
    """Read a filled sheet and its key. Raises LeewayError for a bad label or an id that the key does not have."""
    key: dict[str, Any] | None = None
    labels: dict[str, str] = {}
    seen: set[str] = set()
    for number, record in enumerate(readers.read(path), 2):  # row 1 has the names of the columns
        where = f"{path}, row {number}"
        answer = readers.field(record, (COLUMNS[0],), where)
        key = key or _read_key(folder, answer.partition("-")[0], path)
        if answer not in key["answers"] or answer in seen:
            fault = "is given twice" if answer in seen else f"is not of sheet {key['sheet']}"
            raise LeewayError(f"{where}: answer_id {answer!r} {fault}", fix="restore that cell from the sheet")
        seen.add(answer)
        label = str(record.get("label") or "").strip().lower()
        words = WORDS[key["eval"]]
        if label and label not in words:
            raise LeewayError(f"{where}: label is {label!r}", fix=f"one of: {', '.join(words)}, or leave it empty")
        if label:
            labels[answer] = label
    if key is None or not labels:
        raise LeewayError(f"{path}: no answer has a label", fix="fill in its column label")
    drawn = sum(len(rows) for rows in key["answers"].values())
    return FilledSheet(key, labels, drawn - sum(len(key["answers"][a]) for a in labels))


def _read_key(folder: Path, name: str, path: Path) -> dict[str, Any]:
    place = _key_path(folder, name)
    if not place.is_file():
        raise LeewayError(f"{path}: {folder} has no key of sheet {name!r}", fix="give --run the run it was drawn from")
    with readable(place):
        key = verify_checksum(json.loads(place.read_text("utf-8")))
        if not isinstance(key.get("answers"), dict) or not isinstance(key.get("strata"), list):
            raise ValueError("not the key of a sheet")
        if key.get("eval") not in WORDS or not all(isinstance(rows, list) for rows in key["answers"].values()):
            raise ValueError("not the key of a sheet")
        return key


def labelled_answers(filled: FilledSheet, results: Results) -> pd.DataFrame:
    """Return one line per labelled answer: its row's KEY columns, `cluster`, `response`, `truth`, `stratum`, `weight`.

    The weight is the stratum's answers over those with a label, so answers left without one are taken to be like the
    others of their stratum. Raises LeewayError if the run's answers have changed since the sheet was drawn.
    """
    axis, strata = filled.key["eval"], filled.key["strata"]
    rows = answers_of(results, axis).drop_duplicates(KEY)
    known = dict(
        zip(zip(*(rows[c] for c in KEY), strict=True), zip(rows["response"], rows["cluster"], strict=True), strict=True)
    )
    lines = []
    for answer, label in filled.labels.items():
        for row in filled.key["answers"][answer]:
            response, cluster = known.get(tuple(row[c] for c in KEY), (None, None))
            if response is None or digest(response) != row["response"]:
                what = f"{results.folder}: the answer of {row['objective']} to {row['item_id']} is not the labelled one"
                raise LeewayError(what, fix="draw a new sheet: the run has changed since")
            own = {c: row[c] for c in KEY} | {"cluster": cluster, "response": response, "stratum": row["stratum"]}
            lines.append(own | {"answer_id": answer, "truth": label})
    table = pd.DataFrame(lines)
    labelled = table["stratum"].value_counts()
    table["weight"] = [strata[s]["answers"] / int(labelled[s]) for s in table["stratum"]]
    return table


def missing_strata(filled: FilledSheet) -> int:
    """Return how many strata have no labelled answer; the rates do not cover their answers."""
    labelled = {row["stratum"] for answer in filled.labels for row in filled.key["answers"][answer]}
    return len(filled.key["strata"]) - len(labelled)
