"""`python -m benchmarks.sequential [--studies N] [--out FILE]`: simulate, print and write the table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.sequential.simulate import Outcome, outcome
from benchmarks.statistics.studies import Setting

ALONE = [
    *(Setting(1319, 0.4, r, "capability") for r in (0.4, 0.425, 0.45, 0.5, 0.6, 0.8)),
    *(Setting(200, 0.4, r, "capability") for r in (0.4, 0.6, 0.8)),
    *(Setting(313, 0.1, r) for r in (0.1, 0.15, 0.2, 0.3, 0.5)),
    *(Setting(100, 0.1, r) for r in (0.1, 0.3)),
    *(Setting(600, 0.02, r, attacks=1) for r in (0.02, 0.07)),
    *(Setting(1000, 0.2, r, "persona") for r in (0.2, 0.25, 0.35)),
]
FAMILIES = [
    Setting(200, 0.4, 0.4, "capability", objectives=6),
    Setting(1319, 0.4, 0.4, "capability", objectives=6),
    Setting(600, 0.4, 0.45, "capability", objectives=6),
    Setting(313, 0.1, 0.1, objectives=6),
    Setting(100, 0.02, 0.02, objectives=6),
    Setting(300, 0.2, 0.2, "persona", objectives=6),
    Setting(300, 0.2, 0.25, "persona", objectives=6),
    Setting(313, 0.1, 0.15, objectives=6),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequential", description=__doc__)
    parser.add_argument("--studies", type=int, default=1_000, help="simulated for each line")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("table.md"), help="where the table goes")
    options = parser.parse_args()
    lines = [
        f"One checkpoint of a family of six, {options.studies:,} studies a line; within ±5 points is equivalent.",
        "",
        "| setting | decided different | decided equivalent | open | wrong | prompts used | fixed test: different |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_timed(setting, options.studies, _alone) for setting in ALONE]
    lines += [
        "",
        "Six checkpoints at once: any wrong decision, any significant by Holm, intervals that miss the truth, and a "
        "fixed test read at every look.",
        "",
        "| setting | any wrong | any p, Holm ≤ 0.05 | 95% intervals that miss | fixed test at every look, p ≤ 0.05 |",
        "|---|---|---|---|---|",
    ]
    lines += [_timed(setting, options.studies, _family) for setting in FAMILIES]
    text = "\n".join(lines) + "\n"
    options.out.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {options.out}")


def _timed(setting: Setting, studies: int, line: Callable[[Setting, Outcome], str]) -> str:
    start = time.perf_counter()
    text = line(setting, outcome(setting, studies, seed=11))
    print(f"{text} {time.perf_counter() - start:.0f} s", flush=True)
    return text


def _alone(setting: Setting, o: Outcome) -> str:
    words = (o.different, o.equivalent, abs(round(1 - o.different - o.equivalent, 9)), o.wrong)
    shares = " | ".join(f"{100 * w:.1f}%" for w in words)
    return f"| {setting} | {shares} | {100 * o.asked:.0f}% | {100 * o.fixed:.1f}% |"


def _family(setting: Setting, o: Outcome) -> str:
    if setting.difference:  # there a significant difference is no error
        return f"| {setting} | {100 * o.wrong:.1f}% | – | {100 * o.missed:.2f}% | – |"
    shares = f"{100 * o.significant:.1f}% | {100 * o.missed:.2f}% | {100 * o.naive:.1f}%"
    return f"| {setting} | {100 * o.wrong:.1f}% | {shares} |"


if __name__ == "__main__":
    main()
