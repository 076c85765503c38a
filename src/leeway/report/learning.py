"""State in sentences whether the objectives learned, and for which of them "no drift" is void."""

from __future__ import annotations

from typing import Any

import pandas as pd

from leeway.report import formatting
from leeway.report.formatting import TOKENS, BudgetUnit, capitalize_first, join_and, mapping
from leeway.report.verdict import LEVEL, Arm
from leeway.stats.intervals import NAN
from leeway.stats.learning import FLOOR, MIN_EXAMPLES

RULE = (
    f"Learned: a gain of more than {FLOOR:g} nats per token against the base with plain prompts is shown, in the "
    "held-out NLL of preferred answers or, for objectives trained on pairs, in the margin between preferred and "
    f"dispreferred answers. Moved: no gain is shown, but a KL to the base above {FLOOR:g} nats per token is, on task "
    "prompts or general ones. Void: neither is, so “no drift” of that checkpoint is no evidence of robustness, unless "
    "its capability is shown to have risen, which is learning too. Bounds are over held-out examples and hold jointly "
    "with 95%."
)
SAYS_NOTHING = "so “no drift” may mean that an objective is robust, or that it learned nothing"


def missing(manifest: dict[str, Any]) -> str:
    """Return why the learning check is absent; empty if there is one."""
    if mapping(manifest.get("external")):
        return "the checkpoint was not trained by Leeway"
    if "learning" not in manifest:
        return "the run is older than this check; run the same command again"
    return str(mapping(manifest["learning"]).get("missing", ""))


def void_arms(learned: pd.DataFrame | None, contrasts: pd.DataFrame) -> set[Arm]:
    """Return (objective, budget) of the checkpoints of which nothing is shown to have been learned.

    A gain in capability is learning, whatever the check shows, within a margin too.
    """
    if learned is None or learned.empty:
        return set()
    void = learned[learned["status"] == "void"]
    return set(zip(void["objective"], void["budget"].astype(int), strict=True)) - _gained(contrasts)


def _gained(contrasts: pd.DataFrame) -> set[Arm]:
    """Return the checkpoints with a significant gain on the primary measure of capability."""
    if contrasts.empty:
        return set()
    rises = (contrasts["p_holm"] < LEVEL) & (contrasts["difference"] > 0)
    own = contrasts[rises & contrasts["primary"].astype(bool) & (contrasts["axis"] == "capability")]
    return set(zip(own["objective"], own["budget"].astype(int), strict=True))


def sentences(
    learned: pd.DataFrame | None, contrasts: pd.DataFrame, manifest: dict[str, Any], unit: BudgetUnit = TOKENS
) -> list[str]:
    """Return what was learned by the largest budget, for which objectives "no drift" is void, and CFT's condition."""
    if learned is None or learned.empty:
        return [f"Learning was not measured ({missing(manifest) or 'no checkpoint'}), {SAYS_NOTHING}."]
    last = learned[learned["budget"] == learned["budget"].max()]
    by_status = {s: own.to_dict("records") for s, own in last.groupby("status")}
    at, found = unit.at(int(last["budget"].iloc[0])), []
    void, gained = by_status.get("void", []), _gained(contrasts)
    if own := [a for a in void if (a["objective"], int(a["budget"])) not in gained]:
        found.append(f"“No drift” {at} is void for {_named(own)}: not shown to have learned, nor to have moved.")
    if own := [a for a in void if (a["objective"], int(a["budget"])) in gained]:
        found.append(f"{_named(own)} gained capability, although this check does not show learning.")
    if moved := by_status.get("moved"):
        found.append(f"{_named(moved)} moved from the base without being shown to have learned.")
    if few := by_status.get("unknown"):
        names = join_and([_name(a) for a in few])
        few_items = f"fewer than {MIN_EXAMPLES} held-out examples that the base answered under plain prompts too"
        found.append(f"Whether {names} learned is not known: {few_items}.")
    if shown := [_name(a) for a in by_status.get("learned", [])]:
        every = len(shown) == len(last) > 1
        who = f"every objective ({', '.join(shown)})" if every else join_and(shown)
        are, n = "is" if every or len(shown) == 1 else "are", int(last["n"].max())
        found.append(f"{capitalize_first(at)}, {who} {are} shown to have learned ({n} held-out examples).")
    if not last["n_pairs"].any():
        found.append("There are no held-out pairs, so no preference accuracy.")
    return found + [_condition(a) for a in last[last["cue_gap"].notna()].to_dict("records")]


def _condition(arm: dict[Any, Any]) -> str:
    """State whether CFT's tokens tell its two answers apart, and the one for deployment selects the preferred one."""
    name = formatting.objective_name(str(arm["objective"]))
    gap = f"{formatting.nats(arm['cue_gap'])} nats per token (at least {formatting.nats(arm['cue_gap_low'])})"
    if not arm["cue_gap_low"] > FLOOR:
        text = f"{name} is not shown to have learned its condition: its preference margin differs by {gap}"
        return f"{text} between <SAFE> and <UNSAFE>, beyond the base’s."
    if not arm["margin_gain_low"] > FLOOR:
        text = f"{name} has learned its condition only in part: the preference margin is larger under <SAFE> than under"
        fell = f"but under <SAFE> it changed by {formatting.nats(arm['margin_gain'])} from the base’s"
        return f"{text} <UNSAFE>, by {gap}, {fell}."
    return (
        f"{name} has learned its condition: its preference margin is larger under <SAFE> than under <UNSAFE>, by {gap}."
    )


def _name(arm: dict[Any, Any]) -> str:
    return formatting.objective_name(str(arm["objective"]), str(arm["condition"]))


def _named(arms: list[dict[Any, Any]]) -> str:
    return join_and([f"{_name(a)} ({_distances(a)} nats per token)" for a in arms])


def _distances(arm: dict[Any, Any]) -> str:
    gain, task, general = arm["nll_gain"], arm["kl"], arm.get("kl_general", NAN)
    text = f"gain in NLL {formatting.nats(gain)}, KL {formatting.nats(task, sign=False)}"
    return text if pd.isna(general) else f"{text}, on general prompts {formatting.nats(general, sign=False)}"
