"""The run directory: its files, its lock, and what in it is finished."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from leeway.cache import LEASES, Cache
from leeway.errors import LeewayError
from leeway.evals.eval import Row, is_retryable
from leeway.hashing import digest, file_digest
from leeway.io import (
    PARTIAL,
    atomic_write,
    flush_names,
    make_folder,
    open_lock,
    publish,
    readable,
    remove_partial,
    scratch_file,
    write_file,
    write_json,
)
from leeway.report.validation import manifest_fault
from leeway.stats import mechanism
from leeway.stats.metrics import AT
from leeway.yaml_config import read as read_yaml

INTEGERS = ("seed", "budget", "sample", "step", "examples", "layer", "n")
PROBE_FLOATS = ("value", "low", "high", "control", "scale", "control_low", "control_high", "difference", "p")
FLOATS = ("score", "epochs", "lr", "nll", "base_nll", "rejected_nll", "base_rejected_nll", "kl", "weight_change")


def _schema(columns: str) -> pa.Schema:
    """Return the schema of a table: counts are integers, measurements are floats, all else is text."""

    def kind(column: str) -> pa.DataType:
        if column in INTEGERS or column.endswith("_tokens"):
            return pa.int64()
        if column == "named":
            return pa.bool_()
        return pa.float64() if column in (*FLOATS, *PROBE_FLOATS) else pa.string()

    return pa.schema([(column, kind(column)) for column in columns.split()])


ROW_SCHEMA = _schema(
    "objective seed budget eval attack item_id cluster sample prompt response outcome score unscored_reason judge "
    "judge_raw template_hash adapter_hash new_tokens"
)
LEDGER_SCHEMA = _schema(
    "objective seed budget step source_tokens target_tokens processed_tokens reference_tokens examples epochs "
    "data_hash init_hash reference_hash adapter_hash lr tuning_tokens start_tokens"
)
LEARNING_SCHEMA = _schema(
    "objective seed budget condition prompts item_id answer_tokens nll base_nll rejected_nll base_rejected_nll kl "
    "weight_change adapter_hash"
)
PROBE_VALUES = _schema(" ".join(mechanism.VALUES))  # of each prompt
PROBE_SCHEMA = _schema(" ".join(mechanism.COLUMNS))
PROBE_CONTRASTS = _schema(" ".join(mechanism.CONTRASTS))
SEAL, ITEMS, JUDGE = b"leeway.seal", b"leeway.items", b"leeway.judge"
LOCKS = (".lock", ".workers")
MARK = "@"  # begins the names of controls (`study.controls`)
EDITED = "restore it, or start in another --out"
ROW_ORDER = ["objective", "seed", "budget", "eval", "attack", "item_id", "sample", "template_hash", "judge"]
# what identifies a response: a judge's row on another one is not this one's
RESPONSE = [*(c for c in ROW_ORDER if c != "judge"), "adapter_hash", "response"]


def _without_probe(study_yaml: str) -> Any:
    """Return the study's settings but those of its probe, which changes nothing that a run measured."""
    settings = read_yaml(study_yaml, "study.yaml")
    return {k: v for k, v in settings.items() if k != "probe"} if isinstance(settings, dict) else settings


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at `path`: a lock on a removed file locks nothing."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


class RunDir:
    """One study's run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest_path = folder / "manifest.json"
        self.rows_path = folder / "rows.parquet"
        self.ledger_path = folder / "ledger.parquet"
        self.learning_path = folder / "learning.parquet"
        self.probe_path = folder / "probe.parquet"
        self.probe_contrasts_path = folder / "probe-contrasts.parquet"
        self.controls_path = folder / "controls.parquet"  # rows of controls, in the layout of the study's
        self.cache = Cache.of(folder)

    @contextmanager
    def claimed(self, study_hash: str, study_yaml: str) -> Iterator[None]:
        """Lock the folder for this process and this study.

        Nothing in the folder is written or removed before the lock is held, so a refused run changes nothing. After an
        error the folder is removed only if it holds no finished work (`_vacate`).

        Raises LeewayError where the folder is in use, cannot be written, or holds something else.
        """
        self._check_folder(study_hash)  # before the lock file is created in a folder that is not a run's
        with self._locked() as created:
            known = self._check_folder(study_hash)
            self._wait_for_workers()
            remove_partial(self.folder)
            text = f"# study {study_hash}\n{study_yaml}"
            if known is None:
                write_file(self.folder / "study.yaml", text)
            elif (before := (self.folder / "study.yaml").read_text("utf-8", errors="replace")) != text:
                if _without_probe(before) == _without_probe(text):
                    write_file(self.folder / "study.yaml", text)  # a probe can be added to a run, or changed
                else:
                    raise LeewayError(f"{self.folder / 'study.yaml'} was edited after the run began", fix=EDITED)
            try:
                yield
            except LeewayError:
                if known is None:
                    self._vacate(created)
                raise

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Lock the folder of a finished run for this process. Raises LeewayError if it is none, or in use."""
        if not self.rows_path.is_file():
            raise LeewayError(f"{self.folder} has no rows.parquet: not a finished run", fix="run the study into it")
        with self._locked():
            self._wait_for_workers()
            remove_partial(self.folder)
            yield

    def _check_folder(self, study_hash: str) -> str | None:
        """Return the hash of the study in the folder, or None if it is free. Raises LeewayError if it is taken."""
        if self.folder.exists() and not self.folder.is_dir():
            raise LeewayError(f"{self.folder} is a file", fix="give --out a folder")
        known = self._known_study()
        names = {p.name for p in self.folder.iterdir()} if self.folder.is_dir() else set()
        others = {name for name in names if name not in ("cache", *LOCKS) and not name.startswith(PARTIAL)}
        if known is None and others and (known := self._known_study()) is None:
            raise LeewayError(f"{self.folder} is not empty and holds no study", fix="give --out a new folder")
        if known in (None, study_hash):
            return known
        if "cache" in names and names <= {"study.yaml", "cache", *LOCKS}:
            return None  # a cache is all that an earlier run left: content-addressed, it serves any study
        what = f"{self.folder} holds another study (its hash is {known}, this one's {study_hash})"
        raise LeewayError(what, fix="give another --out, or run the study that the folder holds")

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Create the folder if it is missing, and hold its lock; yield whether it was created.

        Raises LeewayError if the folder is in use, cannot be created, or was removed meanwhile: the results would lie
        elsewhere or nowhere.
        """
        created = False
        while True:
            try:
                make_folder(self.folder.parent)
                with suppress(FileExistsError):
                    self.folder.mkdir()
                    created = True
                    flush_names(self.folder.parent)
                if self.folder.is_symlink() and not self.folder.exists():
                    raise FileNotFoundError(errno.ENOENT, "a symbolic link to a folder that does not exist")
            except OSError as error:
                what = f"{self.folder}: cannot be created ({error.strerror})"
                raise LeewayError(what, fix="give another --out") from error
            try:
                lock = open_lock(self.folder / ".lock")
            except FileNotFoundError:
                continue  # another process has removed the folder that it had created
            with lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    what = f"{self.folder} is in use by another leeway"
                    raise LeewayError(what, fix="wait for it, or give another --out") from error
                if _is_at(lock, self.folder / ".lock"):
                    yield created
                    if not _is_at(lock, self.folder / ".lock"):
                        what = f"{self.folder} was removed or replaced while this command ran"
                        raise LeewayError(what, fix="run the same command again")
                    return

    def _vacate(self, created: bool) -> None:
        """Remove what this run wrote if nothing in the folder is finished work; otherwise leave everything.

        Only `study.yaml`, the manifest, locks, the lease, trackers' files, partial files and empty step logs are not
        work. They are removed one by one; folders only if they are empty, and the run directory only if this process
        created it.
        """
        paths = sorted(self.folder.rglob("*"), reverse=True)  # the content of a folder before the folder
        folders = [p for p in paths if p.is_dir() and not p.is_symlink()]
        files = [p for p in paths if p not in folders]
        if not all(map(self._is_scaffold, files)):
            return
        for path in files:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # a folder that another process has written to meanwhile stays
            for path in folders:
                path.rmdir()
            if created:
                self.folder.rmdir()

    def _is_scaffold(self, path: Path) -> bool:
        """Whether removing a file loses no finished work."""
        if path.is_symlink():
            return False
        own = path in (self.folder / "study.yaml", self.manifest_path) or path.parent == self.cache.root / LEASES
        own |= path.is_relative_to(self.folder / "trackers")
        return own or path.name.startswith((*LOCKS, PARTIAL)) or (path.suffix == ".jsonl" and not path.stat().st_size)

    def _wait_for_workers(self, patience: float = 10.0) -> None:
        """Wait until the workers of a killed run have exited; they exit on their own once the run is gone."""
        with open_lock(self.folder / ".workers") as hold:
            hold.truncate()  # workers end when the token of their run is gone
            until = time.monotonic() + patience
            while True:
                try:
                    fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except OSError as error:
                    if time.monotonic() > until:
                        what = f"{self.folder}: workers of an earlier run are still running"
                        raise LeewayError(what, fix="end them, then run the same command again") from error
                    time.sleep(0.1)

    def _known_study(self) -> str | None:
        path = self.folder / "study.yaml"
        if not path.is_file():
            return None
        first = path.read_text("utf-8", errors="replace").split("\n", 1)[0]
        return first.removeprefix("# study ") if first.startswith("# study ") else "unknown"

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        write_json(self.manifest_path, manifest)

    def read_manifest(self) -> dict[str, Any]:
        if not self.manifest_path.is_file():
            return {}
        with readable(self.manifest_path):
            loaded: dict[str, Any] = json.loads(self.manifest_path.read_text("utf-8"))
            if not isinstance(loaded, dict) or not {"evals", "model"} <= loaded.keys():
                raise ValueError("not a manifest")
            if fault := manifest_fault(loaded):
                raise ValueError(fault)
        return loaded

    def _home(self, name: str) -> Path:
        """The folder of an objective's files; controls have one of their own."""
        return self.folder / "controls" if name.startswith(MARK) else self.folder

    def check(self, control: str) -> Path:
        """What the check of a control's weights found."""
        return self._home(control) / f"{control}.json"

    def checkpoint(self, objective: str, seed: int, budget: int) -> Path:
        return self._home(objective) / "checkpoints" / objective / f"s{seed}" / str(budget)

    def steps(self, log: str) -> Path:
        return self._home(log) / "steps" / f"{log}.jsonl"

    def tuning(self, objective: str) -> Path:
        """The learning rate chosen for an objective, with its trials."""
        return self.folder / "tuning" / f"{objective}.json"

    def part(self, objective: str, seed: int, budget: int, eval_name: str, condition: str) -> Path:
        """The rows of one eval at one checkpoint."""
        under = "" if condition == "plain" else f"-under-{condition.strip('<>').replace(' ', '-').lower()}"
        return self._home(objective) / "parts" / f"{objective}-s{seed}-{budget}-{eval_name}{under}.parquet"

    def write_part(self, path: Path, identity: dict[str, Any], rows: Sequence[Row]) -> None:
        records = [{**identity, **asdict(r), "score": None if math.isnan(r.score) else r.score} for r in rows]
        _write_sealed(path, records, ROW_SCHEMA)

    def read_part(self, path: Path, schema: pa.Schema = ROW_SCHEMA) -> pa.Table:
        """Return the rows of one part. Raises LeewayError if they do not match the digest written with them."""
        with readable(path):
            seal = (pq.read_schema(path).metadata or {}).get(SEAL)
            table = pq.read_table(path, schema=schema).replace_schema_metadata()
            if seal is None or seal.decode() != digest(table.to_pylist()):
                raise ValueError("it was changed after it was written")
        return table

    def is_complete(self, path: Path) -> bool:
        """Whether a part exists and none of its rows is unscored for a retryable reason."""
        if not path.is_file():
            return False
        with readable(path):
            reasons = pq.read_table(path, columns=["unscored_reason"]).column(0).unique().to_pylist()
        return not any(map(is_retryable, reasons))

    def write_rows(self, parts: Sequence[Path], path: Path | None = None) -> int:
        """Write all parts and the rows of judges added by `leeway rescore` as one table; return its length.

        The table is sorted, so that its bytes depend only on its content.
        """
        table = self.with_rescored(pa.concat_tables([self.read_part(part) for part in parts]))
        with atomic_write(path or self.rows_path) as scratch:
            _write_table(table, scratch)
        return int(table.num_rows)

    def rescored(self, judged: str) -> Path:
        """The rows of a judge that was added to a finished run; `judged` is `<eval>@<judge>`."""
        return self.folder / "rescored" / f"{judged}.parquet"

    def write_rescored(self, judged: str, judge_hash: str, records: Sequence[dict[str, Any]]) -> None:
        _write_sealed(self.rescored(judged), records, ROW_SCHEMA, {JUDGE: judge_hash})

    def read_rescored(self, judged: str) -> tuple[str, pa.Table]:
        """Return (hash of the judge, its rows); both empty if there are none."""
        path = self.rescored(judged)
        if not path.is_file():
            return "", ROW_SCHEMA.empty_table()
        table = self.read_part(path)
        return (pq.read_schema(path).metadata or {}).get(JUDGE, b"").decode(), table

    def with_rescored(self, table: pa.Table) -> pa.Table:
        """Return the rows of a study, or of its controls, with those of added judges on the same responses."""
        added = [self.read_part(path) for path in sorted((self.folder / "rescored").glob("*.parquet"))]
        if not added:
            return table
        known = set(_keys(table, RESPONSE))
        fitting = [extra.filter(pa.array([key in known for key in _keys(extra, RESPONSE)])) for extra in added]
        return pa.concat_tables([table, *fitting])

    def stale_rescored(self) -> dict[str, int]:
        """Return, by `<eval>@<judge>`, how many rows of added judges are on answers that the run no longer has."""
        files = sorted((self.folder / "rescored").glob("*.parquet"))
        paths = [p for p in (self.rows_path, self.controls_path) if p.is_file()] if files else []
        known = {key for path in paths for key in _keys(pq.read_table(path, columns=RESPONSE), RESPONSE)}
        stale = {p.stem: sum(key not in known for key in _keys(self.read_part(p), RESPONSE)) for p in files}
        return {judged: n for judged, n in stale.items() if n}

    def add_rescored(self, manifest: dict[str, Any]) -> None:
        """Write the rows of added judges into the run's tables, and the manifest with the new digests.

        While a table is replaced the manifest has its old and its new digest, so that a kill leaves a readable run.
        """
        judges = {(p.stem.split(AT)[0], p.stem.split(AT, 1)[1]) for p in (self.folder / "rescored").glob("*.parquet")}
        digests = dict(manifest.get("file_hashes") or {})
        with ExitStack() as stack:
            new = {}
            for path in (p for p in (self.rows_path, self.controls_path) if p.is_file()):
                table = pq.read_table(path, schema=ROW_SCHEMA).replace_schema_metadata()
                own = [
                    key not in judges for key in zip(*(table[c].to_pylist() for c in ("eval", "judge")), strict=True)
                ]
                new[path] = stack.enter_context(scratch_file(self.folder))
                _write_table(self.with_rescored(table.filter(pa.array(own))), new[path])
            either = {p.name: [*_listed(digests.get(p.name)), file_digest(scratch)] for p, scratch in new.items()}
            self.write_manifest(self.read_manifest() | {"file_hashes": digests | either})
            for path, scratch in new.items():
                publish(scratch, path)
        self.write_manifest(manifest | {"file_hashes": self.file_hashes()})

    def learning(self, objective: str, seed: int, budget: int) -> Path:
        """What the learning check found at one checkpoint."""
        return self.folder / "learning" / f"{objective}-s{seed}-{budget}.parquet"

    def write_learning(self, path: Path, records: Sequence[dict[str, Any]], items_hash: str) -> None:
        _write_sealed(path, records, LEARNING_SCHEMA, {ITEMS: items_hash})

    def has_learning(self, path: Path, items_hash: str) -> bool:
        """Whether a checkpoint was checked on these items."""
        if not path.is_file():
            return False
        with readable(path):
            return bool((pq.read_schema(path).metadata or {}).get(ITEMS, b"").decode() == items_hash)

    def join_learning(self, parts: Sequence[Path]) -> None:
        """Write the learning check of all checkpoints as one table; remove it if there are none."""
        self.learning_path.unlink(missing_ok=True)
        if parts:
            table = pa.concat_tables([self.read_part(path, LEARNING_SCHEMA) for path in parts])
            order = [(c, "ascending") for c in ("objective", "seed", "budget", "condition", "prompts", "item_id")]
            with atomic_write(self.learning_path) as scratch:
                pq.write_table(table.sort_by(order), scratch)

    def write_probe(self, path: Path, records: Sequence[dict[str, Any]], settings_hash: str) -> None:
        """Write the values that a probe measured at one checkpoint."""
        clean = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in records]
        _write_sealed(path, clean, PROBE_VALUES, {ITEMS: settings_hash})

    def read_probe(self, path: Path) -> pa.Table:
        return self.read_part(path, PROBE_VALUES)

    def write_probe_tables(self, table: pd.DataFrame, contrasts: pd.DataFrame) -> None:
        """Write the estimates of a probe and its contrasts between objectives."""
        for frame, schema, path in (
            (table, PROBE_SCHEMA, self.probe_path),
            (contrasts, PROBE_CONTRASTS, self.probe_contrasts_path),
        ):
            with atomic_write(path) as scratch:
                pq.write_table(
                    pa.Table.from_pandas(frame, schema, preserve_index=False).replace_schema_metadata(), scratch
                )

    def conditions(self, parts: dict[Path, str]) -> dict[str, str]:
        """Return the condition of each template hash: `plain`, a control token, `inoculated`."""
        found: dict[str, str] = {}
        for path, condition in parts.items():
            hashes = pq.read_table(path, columns=["template_hash"]).column(0).unique().to_pylist()
            found |= dict.fromkeys(hashes, condition)
        return found

    def file_hashes(self) -> dict[str, str]:
        """Return the digests of tables and study file for the manifest, so that a report refuses edited ones."""
        files = [self.rows_path, self.ledger_path, self.learning_path, self.controls_path]
        files += [self.probe_path, self.probe_contrasts_path, self.folder / "study.yaml"]
        return {p.name: file_digest(p) for p in files if p.is_file()}

    def read_server(self) -> dict[str, Any]:
        """Return what vLLM server measures this run (`vllm.json`), or {}."""
        path = self.folder / "vllm.json"
        if not path.is_file():
            return {}
        with readable(path):
            facts: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if not isinstance(facts, dict):
                raise ValueError("not an object")
        return facts

    def record_server(self, facts: dict[str, Any]) -> None:
        """Write `vllm.json`. Raises LeewayError if an earlier server of this run differs in version or settings."""
        if (earlier := self.read_server()) not in ({}, facts):
            what = f"{self.folder}: vLLM measured with {earlier} there, and would with {facts} now"
            raise LeewayError(what, fix="use the same vLLM and settings, or start in another --out")
        write_json(self.folder / "vllm.json", facts)

    def write_ledger(self, lines: Sequence[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(list(lines), schema=LEDGER_SCHEMA)
        with atomic_write(self.ledger_path) as scratch:
            pq.write_table(table.sort_by([(c, "ascending") for c in ("seed", "budget", "objective")]), scratch)

    def truncate_steps(self, log: str, last: int, own: Path | None = None) -> Path:
        """Truncate a step log after step `last`, so that a resumed run can append to it; return its path.

        With `own`, a worker's folder, the truncated log is a copy there, which `publish_steps` puts into place.
        """
        place = self.steps(log)
        path = (own or place.parent) / place.name
        lines = place.read_text("utf-8").split("\n")[:last] if place.is_file() else []
        write_file(path, "".join(f"{line}\n" for line in lines))
        return path

    def publish_steps(self, log: Path) -> None:
        """Copy a worker's own step log into the run directory, unless the log there is longer."""
        place, text = self.steps(log.stem), log.read_bytes()
        if place == log or (place.is_file() and place.read_bytes().count(b"\n") > text.count(b"\n")):
            return
        write_file(place, text)

    def finish(self) -> None:
        """Remove what a finished run no longer needs: its lease, and its own cached answers, which its rows hold."""
        if self.cache.root == self.folder / "cache":
            self.cache.remove("answers")
        self.cache.release(self.folder)


def _keys(table: pa.Table, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns, row by row."""
    return zip(*(table[c].to_pylist() for c in columns), strict=True)


def _listed(digests: str | list[str] | None) -> list[str]:
    return [digests] if isinstance(digests, str) else [*(digests or ())]


def _write_table(table: pa.Table, path: Path) -> None:
    pq.write_table(table.sort_by([(c, "ascending") for c in ROW_ORDER]), path)


def _write_sealed(
    path: Path, records: Sequence[dict[str, Any]], schema: pa.Schema, metadata: dict[bytes, str] | None = None
) -> None:
    """Write a part with the digest of its content, by which `read_part` notices a change."""
    table = pa.Table.from_pylist(list(records), schema=schema)
    with atomic_write(path) as scratch:
        pq.write_table(table.replace_schema_metadata({SEAL: digest(table.to_pylist()), **(metadata or {})}), scratch)
