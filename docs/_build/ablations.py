"""Draw docs/ablations.svg from finished runs of ablation-kl and ablation-orpo (docs/organism.md).

`python docs/_build/ablations.py KL_RUN ORPO_RUN`
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

BUDGET = 64_000
MEASURES = {"accuracy": ("Accuracy", "#0072b2", "o"), "asr": ("Attack success", "#d55e00", "s")}
PANELS = (
    ("KL, mean over tokens", 0, "kl-token-"),
    ("KL, sum over an answer", 0, "kl-sequence-"),
    ("ORPO, with its likelihood term", 1, "orpo-"),
)


def rates(run: Path) -> pd.DataFrame:
    """Return the difference from the base at the largest budget, in points, with its interval; one row an objective."""
    table = pd.read_csv(run / "tables" / "contrasts.csv")
    chosen = table[table["primary"] & (table["budget"] == BUDGET) & (table["condition"] == "plain")]
    return chosen[["objective", "measure", "difference", "low", "high"]]


def draw(panel: plt.Axes, table: pd.DataFrame, prefix: str, title: str) -> None:
    """Draw a panel: points by weight, and SFT as a band."""
    for measure, (label, colour, marker) in MEASURES.items():
        rows = table[table["measure"] == measure].set_index("objective")
        found = {float(m[1]): name for name in rows.index if (m := re.fullmatch(rf"{prefix}([\d.]+)", name))}
        weights = sorted(found)
        points = rows.loc[[found[w] for w in weights]]
        middle, low, high = (100 * points[c].to_numpy() for c in ("difference", "low", "high"))
        error = [middle - low, high - middle]
        panel.errorbar(weights, middle, error, capsize=2, marker=marker, color=colour, label=label)
        sft = 100 * rows.loc["sft", ["low", "high"]].to_numpy(dtype=float)
        panel.axhspan(*sft, color=colour, alpha=0.12, label=f"{label}, SFT")
    panel.set(xscale="log", title=title, xlabel="weight")
    panel.axhline(0, color="0.5", linewidth=0.8)


def main(runs: list[Path]) -> None:
    mpl.rcParams.update({"svg.hashsalt": "ablations", "font.size": 8, "svg.fonttype": "none"})
    tables = [rates(run) for run in runs]
    figure, panels = plt.subplots(1, len(PANELS), figsize=(9, 3), sharey=True, layout="constrained")
    for panel, (title, run, prefix) in zip(panels, PANELS, strict=True):
        draw(panel, tables[run], prefix, title)
    panels[0].set_ylabel("change from the base, points")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(Path(__file__).parents[1] / "ablations.svg", metadata={"Date": None})


if __name__ == "__main__":
    main([Path(p) for p in sys.argv[1:3]])
