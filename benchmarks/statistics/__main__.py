"""`python -m benchmarks.statistics [--fast] [--out FILE]`: simulate, print and write the table."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.statistics import claims, difference, judges, learning, margins, runs
from benchmarks.statistics.finding import Finding, table

PARTS = [difference.signs, difference.errors, difference.exact, difference.families]
PARTS += [claims.wrong_verdicts, margins.at_margin, margins.earned, runs.over_training_runs, runs.rates, runs.power]
PARTS += [learning.voids, judges.differential]
FULL, FAST = 4_000, 500


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__)
    parser.add_argument("--fast", action="store_true", help=f"{FAST} studies per line instead of {FULL:,}")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("table.md"), help="where the table goes")
    told = parser.parse_args()
    found: list[Finding] = []
    for part in PARTS:
        start = time.perf_counter()
        lines = list(part(FAST if told.fast else FULL))
        print(f"{part.__module__.rpartition('.')[2]}.{part.__name__}: {time.perf_counter() - start:.0f} s", flush=True)
        found += lines
    text = table(found)
    told.out.write_text(text, encoding="utf-8")
    outside = [f for f in found if not f.inside]
    print(f"{text}\n{len(found)} lines, {len(outside)} outside their band; written to {told.out}")


if __name__ == "__main__":
    main()
