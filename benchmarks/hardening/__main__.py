"""`python -m benchmarks.hardening CAMPAIGN [OPTIONS]`: attack Leeway, print what was tried and what failed.

A campaign is a module with two functions: `add_arguments(parser)` and `run(options) -> list[Line]`. Exit 1 if any
attempt failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from benchmarks.hardening.attempts import LIBRARIES
from benchmarks.hardening.table import as_markdown

CAMPAIGNS = {
    "kills": "benchmarks.hardening.kills",
    "power": "benchmarks.hardening.power",
    "faults": "benchmarks.hardening.faults",
    "fuzz": "benchmarks.hardening.fuzz_files",
    "data": "benchmarks.hardening.fuzz_data",
    "runs": "benchmarks.hardening.fuzz_runs",
    "models": "benchmarks.hardening.fuzz_models",
    "text": "benchmarks.hardening.hostile_text",
    "injection": "benchmarks.hardening.injection",
    "load": "benchmarks.hardening.load",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in CAMPAIGNS:
        sys.exit(f"usage: python -m benchmarks.hardening {{{','.join(CAMPAIGNS)}}} [--seed N] [options]")
    campaign = import_module(CAMPAIGNS[name])
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.hardening {name}", description=campaign.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--folder", type=Path, help="where its files go (default: a temporary folder)")
    campaign.add_arguments(parser)
    options = parser.parse_args(sys.argv[2:])
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hardening-") as scratch:
        options.folder = (options.folder or Path(scratch)).resolve()
        options.folder.mkdir(parents=True, exist_ok=True)
        for variable in LIBRARIES:
            os.environ[variable] = str(options.folder / "libraries")
        lines = campaign.run(options)
    print(f"\n{as_markdown(lines)}\n{time.monotonic() - start:.0f} s, seed {options.seed}", flush=True)
    sys.exit(any(line.failed for line in lines))


if __name__ == "__main__":
    main()
