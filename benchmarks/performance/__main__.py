"""`python -m benchmarks.performance`: measure both sides in rounds and print the table; see docs/performance.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.performance import profiling, real, rounds, table
from benchmarks.performance.shapes import SHAPES, written
from benchmarks.performance.texts import corpus
from leeway.errors import LeewayError


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="one shape (default: S, M and SmolLM2)")
    parser.add_argument("--only", default="", help="some of sft,cft,ip,kl,dpo,orpo,dpo-corrupted,answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/performance"), help="models and results")
    parser.add_argument("--steps", type=int, help="timed steps of a measurement (default: by shape)")
    parser.add_argument("--threads", type=int, default=2, help="of every process but the workers'")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where the machine is shared")
    parser.add_argument("--tune", action="store_true", help="find the peer's best settings, and keep them")
    parser.add_argument("--report", action="store_true", help="rebuild the table from the results under --out")
    parser.add_argument("--study", action="store_true", help="run a small study from start to end on both sides")
    parser.add_argument("--profile", metavar="OBJECTIVE", help="where a step of ours spends its time")
    return parser.parse_args()


def main() -> None:
    options = asked()
    shapes = (options.shape,) if options.shape else ("S", "M", "SmolLM2")
    if not options.report:
        for shape in shapes:
            written(SHAPES[shape], options.out / "models", corpus())
    if options.profile:
        print(profiling.told(shapes[0], options.profile, options.out / "models"))
        return
    bench = rounds.Bench(
        options.out,
        lambda line: print(line, file=sys.stderr, flush=True),
        options.threads,
        options.clock,
        options.steps,
    )
    only = [name for name in options.only.split(",") if name]
    every = [cell for shape in shapes for cell in rounds.cells(shape, only)]
    if options.study:
        for shape in shapes:
            real.run(shape, options.out, rounds.tuned_of(shape))
    elif options.tune:
        rounds.tune(bench, every)
    elif not options.report:
        bench.run(every, options.rounds)
    print(table.report(options.out, shapes), end="")


if __name__ == "__main__":
    try:
        main()
    except LeewayError as error:
        sys.exit(f"error: {error}")
