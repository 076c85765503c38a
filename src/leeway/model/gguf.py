"""GGUF files: de-quantised once into the model cache as a Hugging Face folder in float32, checked by content hash."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from leeway.cache import ENVIRONMENT, user_root
from leeway.errors import LeewayError, first_line
from leeway.hashing import digest, file_digest
from leeway.io import atomic_folder, open_lock, write_json

ARCHITECTURES = ("llama", "qwen2", "qwen3")
FORMAT = 1  # of the converted folder; a change converts every file anew
ORIGIN = "leeway_origin.json"
EXTRA = "pip install 'leeway[smollm2]'"


def models_root() -> Path:
    """Return the folder of converted models, shared by all runs."""
    return user_root() / "models"


def origin(folder: Path) -> dict[str, Any]:
    """Return where a converted model came from, for the manifest; empty for any other folder."""
    path = folder / ORIGIN
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def dequantised(path: Path, source: dict[str, Any] | None = None) -> Path:
    """Return the Hugging Face folder of a GGUF file (Llama or Qwen architecture), converting it on first use.

    The cache key is the file's content. `source` names the package the file comes from. Raises LeewayError for a
    missing, truncated or unsupported file, without the `gguf` package, or if the cache has no room.
    """
    if not path.is_file():
        raise LeewayError(f"model {path}: no such file", fix="give the path of a GGUF file")
    key = file_digest(path)
    return cached_model(
        digest("gguf", FORMAT, key),
        f"de-quantising {path.name}",
        lambda scratch: _convert(path, scratch, {**(source or {}), "file": path.name, "file_hash": key}),
    )


def cached_model(key: str, what: str, make: Callable[[Path], dict[str, Any]]) -> Path:
    """Return the cached model folder of that key, verified; else make it, atomically, by one process at a time.

    `make` fills a folder and returns its origin.
    """
    folder = models_root() / key
    if not is_converted(folder):
        with _converting(folder.parent / f".{key}.lock"):
            if not is_converted(folder):
                print(f"{what} into {folder} (once)", file=sys.stderr, flush=True)
                with atomic_folder(folder, is_converted) as scratch:
                    facts = make(scratch)
                    for file in scratch.iterdir():
                        file.chmod(0o644)  # the library writes weights for their owner alone
                    hashes = {p.name: file_digest(p) for p in sorted(scratch.iterdir())}
                    write_json(scratch / ORIGIN, {**facts, "files": hashes})
    _verify(folder, (folder / ORIGIN).stat().st_mtime_ns)
    return folder


def is_converted(folder: Path) -> bool:
    return (folder / ORIGIN).is_file()


@cache
def _verify(folder: Path, _: int) -> None:
    for name, expected in origin(folder)["files"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != expected:
            raise LeewayError(
                f"{folder}: {name} is damaged or missing", fix="delete the folder, and load or fetch the model again"
            )


@contextmanager
def _converting(lock: Path) -> Iterator[None]:
    """Hold a lock while one process converts; name the cache where it cannot be written."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open_lock(lock) as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise LeewayError(
            f"{lock.parent}: the model cache cannot be written ({error.strerror or first_line(error)})",
            fix=f"free some disk space, or set {ENVIRONMENT} to another folder",
        ) from error


def _convert(path: Path, scratch: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """De-quantise into `scratch` and return the facts with architecture and quantisation."""
    facts = {**facts, **_inspect(path)}
    require_room(scratch, 4 * facts["parameters"])
    import torch
    import transformers

    quiet_loaders()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _packs(transformers) else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        lm = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **unpack)
        if unpack:  # the weights are plain tensors now, and are saved as such
            lm.hf_quantizer = None
            lm.config.__dict__.pop("quantization_config", None)
        lm.save_pretrained(scratch)
    except Exception as error:  # a GGUF that the library cannot read raises anything
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the file's content
            raise
        raise LeewayError(
            f"model {path}: cannot be de-quantised ({first_line(error)})",
            fix=f"give a GGUF of another quantisation, of an architecture among {', '.join(ARCHITECTURES)}",
        ) from error
    tokenizer.save_pretrained(scratch)
    drop_library_version(scratch)
    return facts


def drop_library_version(folder: Path) -> None:
    """Remove the writing library's version from config.json, which is part of the model's content hash."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    write_json(folder / "config.json", {k: v for k, v in config.items() if k != "transformers_version"})


def quiet_loaders() -> None:
    """Silence the progress bars and notices of the loading libraries."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _packs(transformers: Any) -> bool:
    """Return whether this version of transformers keeps GGUF weights packed by default."""
    return hasattr(transformers, "GgufConfig")


def _inspect(path: Path) -> dict[str, Any]:
    """Return the file's architecture, quantisation and number of parameters."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise LeewayError(f"model {path}: GGUF files need the gguf package", fix=EXTRA) from error
    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        kinds = [str(t.tensor_type.name) for t in reader.tensors if len(t.shape) > 1]
        parameters = sum(int(t.n_elements) for t in reader.tensors)
    except Exception as error:  # the reader raises whatever its arrays raise
        raise LeewayError(
            f"model {path}: not a whole GGUF file ({first_line(error)})", fix="fetch it again; it may be truncated"
        ) from error
    if architecture not in ARCHITECTURES:
        raise LeewayError(
            f"model {path}: architecture {architecture!r} is not supported",
            fix=f"give a GGUF of one of {', '.join(ARCHITECTURES)}",
        )
    quantisation = max(sorted(set(kinds)), key=kinds.count)
    return {
        "architecture": architecture,
        "quantisation": quantisation,
        "parameters": parameters,
        "converter": {name: version(name) for name in ("gguf", "transformers")},
    }


def require_room(folder: Path, needed: int) -> None:
    """Raise LeewayError if the disk of `folder` has less than `needed` bytes and a tenth more."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise LeewayError(
            f"{folder.parent}: {1.1 * needed / 2**30:.1f} GiB needed for the converted model, {free / 2**30:.1f} free",
            fix=f"free some disk space, or set {ENVIRONMENT} to another folder",
        )
