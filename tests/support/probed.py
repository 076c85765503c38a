"""A made-up probe: estimates with known layers, for any objectives and budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from leeway.stats.mechanism import COLUMNS, CONTRASTS

NAN = float("nan")
LAYERS = 4
WITHHELD = "withheld: the models' difference is not shown (+0.05 [-0.10, 0.20])"
FACTS: dict[str, Any] = {
    "reference": "sft",
    "direction": {"layer": 2, "position": "-1", "limits": "", "layers": LAYERS},
    "prompts": {"n": {"test": {"harmful": 24, "harmless": 24}}, "origins": {"harmful": "made up"}},
    "openings": {"version": 1},
    "persona": "statements",
}


def line(objective: str, budget: int, measure: str, detail: str = "", **more: Any) -> dict[str, Any]:
    plain = dict.fromkeys(COLUMNS, NAN) | {"objective": objective, "seed": 0, "budget": budget, "measure": measure}
    plain |= {"detail": detail, "layer": -1, "site": "", "position": "", "n": 24.0, "p": 1.0, "named": False}
    plain |= {"unit": "", "reason": ""} | more
    if plain["value"] == plain["value"] and "low" not in more:
        plain |= {"low": plain["value"] - 0.05, "high": plain["value"] + 0.05}
    return plain


def effects(
    objective: str, budget: int, measure: str, detail: str, planted: tuple[int, str] | None, share: float = 0.8
) -> list[dict[str, Any]]:
    """A measure at every layer and site: `share` at the planted place, 0.02 elsewhere; withheld without one."""
    found = []
    sites = ("resid", "attn", "mlp") if measure == "patching" else ("attn", "mlp")
    for layer in range(LAYERS):
        for site in sites:
            named = planted is not None and (layer, site) in (planted, (planted[0], "resid"))
            where = {"layer": layer, "site": site, "named": named, "p": 0.001 if named else 0.8}
            where |= {"control": 0.05 if measure == "patching" else NAN}
            value = share if named else 0.02
            found.append(line(objective, budget, f"{measure}-effect", detail, value=2 * value, unit="nats", **where))
            own = {"value": value} if planted else {"value": NAN, "control": NAN, "reason": WITHHELD}
            found.append(line(objective, budget, measure, detail, unit="share", **where | own))
    return found


def checkpoint(
    objective: str, budget: int, planted: tuple[int, str] | None = None, *, cosine: float = 0.99, mediated: bool = False
) -> list[dict[str, Any]]:
    """Every measure of one checkpoint: its change is carried by the attention or MLP at `planted`, or by none."""
    found = [line(objective, budget, "refusal-logit", f"{s}, {k}", value=v, unit="nats") for s, k, v in LOGITS]
    for detail in ("base to checkpoint", "checkpoint to base"):
        found += effects(objective, budget, "patching", detail, planted)
    for measure in ("leave-one-out", "one-alone"):
        found += effects(objective, budget, measure, "", planted, 0.7)
    share = {"named": mediated, "control": 0.01, "value": 0.9 if mediated else 0.02}
    found.append(line(objective, budget, "mediation-effect", "none", unit="points", **share | {"value": 0.2}))
    found.append(line(objective, budget, "mediation", "none", unit="share", **share))
    for layer in range(LAYERS):
        at = {"layer": layer, "site": "resid", "position": "-1"}
        found.append(line(objective, budget, "direction-cosine", value=cosine, control=0.95, **at))
        found.append(line(objective, budget, "direction-auroc", value=0.97, **at))
        found.append(line(objective, budget, "direction-auroc-control", "random", value=0.6, **at))
        found.append(line(objective, budget, "persona-shift", "narcissism", value=0.3 + layer, control=0.1, **at))
        found.append(line(objective, budget, "persona-vector-halves", "narcissism", value=0.9, **at))
        for site in ("attn", "mlp"):
            part = {"layer": layer, "site": site}
            found.append(line(objective, budget, "weight-norm", value=1.0 + layer, low=NAN, **part))
            found.append(line(objective, budget, "weight-on-direction", value=0.1, low=NAN, control=0.09, **part))
    for kind in ("harmful answers", "harmless answers"):
        for token in range(1, 9):
            at = {"position": f"answer {token}", "unit": "nats"}
            found.append(line(objective, budget, "token-kl", kind, value=0.5 / token, **at))
    return found


LOGITS = [("base", "harmful", 3.0), ("checkpoint", "harmful", 1.0), ("change", "harmful", -2.0)]
LOGITS += [("base", "harmless", -5.0), ("checkpoint", "harmless", -6.0), ("change", "harmless", -1.0)]


def contrast(objective: str, budget: int, measure: str, detail: str, difference: float, p: float, **at: Any) -> Any:
    plain = {"objective": objective, "reference": "sft", "seed": 0, "budget": budget, "measure": measure}
    plain |= {"detail": detail, "layer": -1, "site": "", "position": "", "difference": difference, "p": p, "n": 24}
    return plain | {"low": difference - 0.1, "high": difference + 0.1} | at


def tables(budgets: tuple[int, ...] = (25_000, 100_000)) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a probe of SFT (MLP of layer 2, mediated), CFT (a turned direction, nothing named) and KL (withheld)."""
    lines: list[dict[str, Any]] = []
    for budget in budgets:
        lines += checkpoint("sft", budget, (1, "mlp"), mediated=True)
        lines += checkpoint("cft", budget, (0, "attn"), cosine=0.5)
        lines += checkpoint("kl", budget)
    for layer in range(LAYERS):
        at = {"layer": layer, "site": "resid", "position": "answer"}
        lines.append(line("data", 0, "persona-data", "narcissism", value=0.1 * layer, **at))
    table = pd.DataFrame(lines, columns=COLUMNS)
    nothing = (table["objective"] == "cft") & table["named"]
    table.loc[nothing, "named"] = False
    at = {"layer": 1, "site": "mlp"}
    paired = [contrast("kl", budgets[-1], "patching", "base to checkpoint", -1.2, 0.001, **at)]
    paired += [contrast("kl", budgets[-1], "refusal-logit", "checkpoint, harmful", 1.5, 0.001)]
    paired += [contrast("cft", budgets[-1], "patching", "base to checkpoint", -0.05, 0.6, **at)]
    return table, pd.DataFrame(paired, columns=CONTRASTS)


def write(folder: Path, table: pd.DataFrame, paired: pd.DataFrame, **facts: Any) -> Path:
    """Add a probe to a run directory."""
    table.to_parquet(folder / "probe.parquet")
    paired.to_parquet(folder / "probe-contrasts.parquet")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(manifest | {"probe": FACTS | facts}), "utf-8")
    return folder
