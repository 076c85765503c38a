"""State what a probe shows of the mechanism, for the verdict and the page.

A sentence of the verdict needs a causal measure (activation patching, parts of the update, mediation) that is `named`:
its interval excludes 0 and its control by random directions, where one applies (`leeway.stats.mechanism`). Geometry is
reported by cosine and AUROC together, and never alone.

With several training seeds values are means over seeds, intervals reach from the lowest to the highest end, and a place
is named only if it is in every seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from leeway.report import formatting
from leeway.report.formatting import BudgetUnit, join_and, mapping
from leeway.report.plotting import order_objectives
from leeway.stats.mechanism import CAUSAL, COLUMNS, CONTRASTS, prediction
from leeway.stats.metrics import DIRECT

if TYPE_CHECKING:
    from leeway.report.results import Results

Line = dict[str, Any]
FAMILIES = {  # table of the report: beginnings of its measures' names
    "probe-causal": (*CAUSAL, "refusal-logit"),
    "probe-geometry": ("direction-", "cka"),
    "probe-persona": ("persona-",),
    "probe-depth": ("token-kl",),
    "probe-weights": ("weight-", "stable-rank"),
}
INTO_CHECKPOINT, INTO_BASE = "base to checkpoint", "checkpoint to base"
SITES = {"resid": "residual stream", "attn": "attention", "mlp": "MLP"}
COMPONENTS = ("attn", "mlp")
TRAIT = "endorsement:"
DATA = "persona-data"  # the training data's projection, before training
LEVEL = 0.05
OPENING = 5  # answer tokens
MOST = 2  # places named in one sentence
RULE = (
    "A probe compares each checkpoint with the base inside the model. L is the refusal logit of the test prompts: the "
    "log-odds that the answer opens with a refusal. Patching puts one model’s activations into the other; leaving out "
    "and one alone switch parts of the update; mediation puts the base’s component along the refusal direction back "
    "while the checkpoint answers. Share: of the difference between the two models; withheld where this difference is "
    "not shown. Named: the effect is significant after adjustment for all layers and sites and outside the middle 95% "
    "of random directions of equal norm, where the two models differ by more than 1 nat (mediation: at all). The "
    "largest of several effects is overestimated. Without a named causal measure nothing is said of a mechanism; how "
    "directions lie (cosine, AUROC) is description."
)


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Return the probe's estimates, one table per family of measures, and its contrasts; empty without a probe."""
    table = results.probe_table
    if table is None:
        return {}
    found = {name: table[table["measure"].str.startswith(starts)] for name, starts in FAMILIES.items()}
    known = tuple(start for starts in FAMILIES.values() for start in starts)
    found["probe-other"] = table[~table["measure"].str.startswith(known)]
    if results.probe_contrasts is not None:
        found["probe-contrasts"] = results.probe_contrasts
    found["probe-prediction"] = predicted(results)
    return {name: own.reset_index(drop=True) for name, own in found.items() if not own.empty}


def predicted(results: Results) -> pd.DataFrame:
    """Return what the training data predicted of each trait and what came (`prediction`), training seeds pooled."""
    table, changes = results.probe_table, results.contrasts()
    if table is None or changes.empty or not (table["measure"] == DATA).any():
        return pd.DataFrame()
    own = changes[changes["measure"].str.startswith(TRAIT) & changes["first"].astype(bool)]
    drift = own.assign(seed=0, trait=own["measure"].str.removeprefix(TRAIT))
    drift = drift[["objective", "seed", "budget", "trait", "difference"]]
    return prediction(pooled(table).assign(seed=0), drift).drop(columns="seed")


def place(layer: int, site: str) -> str:
    """Return `MLP of layer 1` (layers are counted from 0 in tables, from 1 for readers)."""
    if site.startswith("layers"):
        return site.replace("-", "–")
    if site not in SITES:
        return "whole model" if layer < 0 else f"layer {layer + 1}"
    return f"{SITES[site]} {'after' if site == 'resid' else 'of'} layer {layer + 1}"


@dataclass(frozen=True)
class Probe:
    """A probe's estimates with training seeds pooled (`COLUMNS` without `seed`), and what the manifest says of it."""

    table: pd.DataFrame
    contrasts: pd.DataFrame
    predicted: pd.DataFrame
    facts: dict[str, Any]
    unit: BudgetUnit
    seeds: int

    @classmethod
    def of(cls, results: Results) -> Probe | None:
        """Return the run's probe, None if it has none."""
        table, paired = results.probe_table, results.probe_contrasts
        if table is not None:
            table = table[table["measure"] != DATA]  # of no checkpoint
        if table is None or table.empty:
            return None
        paired = pd.DataFrame(columns=["objective", "seed"]) if paired is None else paired
        facts, seeds = mapping(results.manifest.get("probe")), table["seed"].nunique()
        order = order_objectives([str(o) for o in table["objective"].unique()], results.study)
        table = table.sort_values("objective", key=lambda o: o.map(order.index), kind="stable")
        return cls(pooled(table), paired, predicted(results), facts, BudgetUnit.of(results.manifest), seeds)

    @cached_property
    def largest(self) -> int:
        """The largest budget that was probed."""
        return int(self.table["budget"].max())

    @cached_property
    def layers(self) -> int:
        return int(self.table["layer"].max()) + 1

    @cached_property
    def objectives(self) -> list[str]:
        return [str(o) for o in self.table["objective"].unique()]

    @property
    def direction(self) -> dict[str, Any]:
        return mapping(self.facts.get("direction"))

    @cached_property
    def layer(self) -> int:
        """The layer of the refusal direction, from 0; the last one if the manifest names none."""
        layer = self.direction.get("layer")
        return layer if isinstance(layer, int) and 0 <= layer < self.layers else self.layers - 1

    def at(self, measure: str, detail: str | None = None, *, budget: int | None = None) -> pd.DataFrame:
        """Return a measure's lines at a budget (by default the largest); `budget` 0: at all."""
        own = self.table[self.table["measure"] == measure]
        if budget != 0:
            own = own[own["budget"] == (budget or self.largest)]
        return own if detail is None else own[own["detail"] == detail]

    def of_direction(self, measure: str, detail: str | None = None) -> pd.DataFrame:
        """Return a measure's lines at the refusal direction's layer and position, at the largest budget."""
        own = self.at(measure, detail)
        return own[(own["layer"] == self.layer) & (own["position"] == self.position)]

    @cached_property
    def position(self) -> str:
        """The refusal direction's position: `instruction`, or a count from the prompt's end."""
        return str(self.direction.get("position", "-1"))


def pooled(table: pd.DataFrame) -> pd.DataFrame:
    """Return one line per objective, budget, measure and place: the mean over seeds, with the widest ends."""
    if table["seed"].nunique() < 2:
        return table.drop(columns="seed")
    keys = [c for c in COLUMNS[: COLUMNS.index("value")] if c != "seed"]
    rules: dict[str, Any] = {"value": lambda v: v.mean(skipna=False), "control": "mean", "n": "sum", "p": "max"}
    rules |= dict.fromkeys(("low", "control_low"), "min") | dict.fromkeys(("high", "control_high"), "max")
    rules |= {"named": "all", "unit": "first", "reason": lambda r: "; ".join(t for t in dict.fromkeys(r) if t)}
    found = table.groupby(keys, sort=False, dropna=False).agg(rules).reset_index()
    withheld = found["value"].isna()
    ends = ["low", "high", "control", "control_low", "control_high"]
    found.loc[withheld, ends] = float("nan")
    return found[[c for c in COLUMNS if c != "seed"]]


def largest_component(lines: pd.DataFrame) -> Line | None:
    """Return the attention or MLP with the largest effect, named ones first; None without any."""
    own = lines[lines["site"].isin(COMPONENTS) & lines["value"].notna()]
    if own.empty:
        return None
    order = own.assign(size=own["value"].abs()).sort_values(["named", "size"], ascending=False, kind="stable")
    return formatting.to_records(order.head(1))[0]


def verdict(probe: Probe | None) -> list[str]:
    """Return the sentences that a causal measure supports, and for which objectives none does."""
    if probe is None:
        return []
    found, without = [], []
    for objective in probe.objectives:
        sentence = _causal(probe, objective)
        found += [sentence] if sentence else []
        without += [] if sentence else [formatting.objective_name(objective)]
    found += _against_reference(probe)
    if without:
        found.append(f"No mechanism is shown for {join_and(without)}: no causal measure of the probe is named.")
    limits = str(probe.direction.get("limits") or "")
    if limits and any("refusal direction" in text for text in found):
        found.append(f"The refusal direction has a limit: {limits}.")
    return found


def summary(probe: Probe) -> str:
    """Say in one sentence which kinds of causal measures are named for which objectives."""
    kinds = {"patching": _patches, "parts of the update": _update, "mediation by the refusal direction": _mediation}
    each, none = [], []
    for objective in probe.objectives:
        named = [kind for kind, found in kinds.items() if any(found(probe, objective))]
        name = formatting.objective_name(objective)
        each += [f"{name} ({', '.join(named)})"] if named else []
        none += [] if named else [name]
    found = [f"Named causal measures, {probe.unit.at(probe.largest)}: {'; '.join(each)}."] if each else []
    found += [f"None for {join_and(none)}, so no mechanism is shown there."] if none else []
    return " ".join(found)


def _causal(probe: Probe, objective: str) -> str:
    """State an objective's named causal measures at the largest budget; empty if none is."""
    parts = [*_patches(probe, objective), *_update(probe, objective), *_mediation(probe, objective)]
    if not parts:
        return ""
    name, at = formatting.objective_name(objective), probe.unit.at(probe.largest)
    return f"Mechanism of {name}, {at}: {_loss(probe, objective)}{'; '.join(parts)}."


def _loss(probe: Probe, objective: str) -> str:
    own = probe.at("refusal-logit")
    value = own[own["objective"] == objective].set_index("detail")["value"].to_dict()
    if not {"base, harmful", "checkpoint, harmful"} <= set(value):
        return ""
    ends = (formatting.nats(value[f"{side}, harmful"], sign=False) for side in ("base", "checkpoint"))
    return f"the refusal logit of harmful prompts goes from {' to '.join(ends)} nats; "


def _patches(probe: Probe, objective: str) -> Iterator[str]:
    own = _components(probe, "patching", objective, INTO_CHECKPOINT)
    named = _named(own)
    if named:
        shown = join_and([f"{_share(c)} through the {place(c['layer'], c['site'])}" for c in named[:MOST]])
        count = f"{len(named)} of {len(own)} attention and MLP outputs are named"
        yield f"the base’s activations put back restore {shown} ({count})"


def _update(probe: Probe, objective: str) -> Iterator[str]:
    texts = {
        "leave-one-out": "leaving out the update of the {} restores",
        "one-alone": "the update of the {} alone causes",
    }
    for measure, text in texts.items():
        if named := _named(_components(probe, measure, objective)):
            yield f"{text.format(place(named[0]['layer'], named[0]['site']))} {_share(named[0])}"


def _mediation(probe: Probe, objective: str) -> Iterator[str]:
    own = probe.at("mediation")
    each = []
    for c in _named(own[own["objective"] == objective]):
        setting = "on direct requests" if c["detail"] == DIRECT else f"under {formatting.attack_name(c['detail'])}"
        each.append(f"{_share(c)} {setting}")
    if each:
        what = "of the change of attack success, the base’s component along the refusal direction, put back, undoes"
        yield f"{what} {join_and(each)}"


def _components(probe: Probe, measure: str, objective: str, detail: str | None = None) -> pd.DataFrame:
    own = probe.at(measure, detail)
    return own[(own["objective"] == objective) & own["site"].isin(COMPONENTS)]


def _named(own: pd.DataFrame) -> list[Line]:
    """Return the named lines that have a value, the largest share first."""
    shown = own[own["named"].astype(bool) & own["value"].notna()]
    return formatting.to_records(shown.sort_values("value", ascending=False, kind="stable"))


def _share(c: Line) -> str:
    ends = f"95% CI {share(c['low'])} to {share(c['high'])}"
    random = "" if c["control"] is None else f"; a random direction {share(c['control'])}"
    return f"{share(c['value'])} ({ends}{random})"


def share(value: float | None) -> str:
    """Return a share in per cent, which may be below 0 or above 100."""
    return formatting.percent(value).replace("-", formatting.MINUS)


def _against_reference(probe: Probe) -> Iterator[str]:
    """State, per objective, how much less the reference's largest named patch does; only where this is significant."""
    paired = _pooled_contrasts(probe.contrasts)
    paired = paired[paired["budget"] == probe.largest]
    reference = str(paired["reference"].iloc[0]) if len(paired) else ""
    named = _named(_components(probe, "patching", reference, INTO_CHECKPOINT))
    if not named:
        return
    layer, site = named[0]["layer"], named[0]["site"]
    for objective, own in paired.groupby("objective", sort=False):
        patch = own[(own["measure"] == "patching") & (own["detail"] == INTO_CHECKPOINT)]
        patch = patch[(patch["layer"] == layer) & (patch["site"] == site) & (patch["p"] < LEVEL)]
        patch = patch[(patch["low"] > 0) | (patch["high"] < 0)]  # seeds that differ in sign show nothing
        if patch.empty:
            continue
        c = formatting.to_records(patch)[0]
        more = "less" if c["difference"] < 0 else "more"
        kept = own[(own["measure"] == "refusal-logit") & (own["detail"] == "checkpoint, harmful")]
        logit = "".join(f"; its refusal logit is {_nats_ci(k)} {_than(k)}" for k in formatting.to_records(kept))
        names = " against ".join(formatting.objective_name(o) for o in (str(objective), reference))
        patch_text = f"the patch of the {place(layer, site)} restores {_nats_ci(c)} {more}"
        yield f"{names}, {probe.unit.at(probe.largest)}: {patch_text}{logit}."


def _pooled_contrasts(paired: pd.DataFrame) -> pd.DataFrame:
    """Return contrasts with seeds pooled: the mean, from the lowest to the highest end, with the largest p-value."""
    if paired.empty or paired["seed"].nunique() < 2:
        return paired
    keys = [c for c in CONTRASTS[: CONTRASTS.index("difference")] if c != "seed"]
    rules = {"difference": "mean", "low": "min", "high": "max", "p": "max", "n": "sum"}
    return paired.groupby(keys, sort=False, dropna=False).agg(rules).reset_index()


def _than(c: Line) -> str:
    return "higher" if c["difference"] > 0 else "lower"


def _nats_ci(c: Line) -> str:
    """Return the size of a difference, with its interval in the same direction."""
    sign = -1 if c["difference"] < 0 else 1
    low, high = sorted(sign * c[k] for k in ("low", "high"))
    ends = f"95% CI {formatting.nats(low, sign=False)} to {formatting.nats(high, sign=False)}"
    return f"{formatting.nats(abs(c['difference']), sign=False)} nats ({ends})"


def description(probe: Probe) -> list[str]:
    """Return what is not causal: withheld shares, geometry and where it disagrees, depth in tokens, the direction."""
    found = [*_withheld(probe), *_geometry(probe), *_disagreements(probe), *_depth(probe), *_predicted(probe)]
    if limits := str(probe.direction.get("limits") or ""):
        found.append(f"Limit of the refusal direction: {limits}.")
    return [*found, *(str(note) for note in probe.facts.get("notes") or [])]


def _withheld(probe: Probe) -> Iterator[str]:
    """Name the shares that are withheld at the largest budget and why, and count those at smaller ones."""
    own = probe.table[probe.table["measure"].isin(CAUSAL) & probe.table["value"].isna() & (probe.table["reason"] != "")]
    own = own.drop_duplicates(["objective", "budget", "measure", "detail", "reason"])
    for measure, what in (("patching", "patching and parts of the update"), ("mediation", "mediation")):
        lines = own[own["measure"] == measure]
        last = lines[lines["budget"] == probe.largest]
        if measure == "patching":
            last = last.drop_duplicates(["objective", "reason"])
        each = []
        for c in formatting.to_records(last):
            setting = f"{formatting.attack_name(c['detail'])}: " if measure == "mediation" and c["detail"] else ""
            reason = c["reason"].removeprefix("withheld: ").replace("-", formatting.MINUS)
            each.append(f"{formatting.objective_name(c['objective'])} ({setting}{reason})")
        smaller = len(lines[lines["budget"] < probe.largest].drop_duplicates(["objective", "budget"]))
        each += [f"{smaller} checkpoint{'s' * (smaller > 1)} at smaller budgets (tables/probe-causal.csv)"] * (
            smaller > 0
        )
        if each:
            yield f"Shares withheld, {what}: {join_and(each)}."


def _geometry(probe: Probe) -> Iterator[str]:
    """Report cosine and AUROC of each objective at the direction's layer, always together."""
    each = [(o, _geometry_of(probe, o)) for o in probe.objectives]
    known = [f"{formatting.objective_name(o)} {_both(*found)}" for o, found in each if found]
    if known:
        yield (
            f"Layer {probe.layer + 1}, the checkpoint’s direction and the base’s (cosine), and the base’s direction on "
            f"the checkpoint’s states (AUROC): {'; '.join(known)}. This is description, no evidence of a mechanism."
        )


def _geometry_of(probe: Probe, objective: str) -> tuple[Line, Line] | None:
    found = []
    for measure in ("direction-cosine", "direction-auroc"):
        own = probe.of_direction(measure)
        own = own[(own["objective"] == objective) & own["value"].notna()]
        found += formatting.to_records(own.head(1))
    return (found[0], found[1]) if len(found) == 2 else None


def _disagreements(probe: Probe) -> Iterator[str]:
    """Say where geometry and causal measures, or two causal measures, point to different things."""
    only: dict[bool, list[str]] = {True: [], False: []}  # by whether a causal measure is named
    for objective in probe.objectives:
        is_causal, geometry = bool(_causal(probe, objective)), _geometry_of(probe, objective)
        if geometry and is_causal != _turned(geometry[0]):
            only[is_causal].append(formatting.objective_name(objective))
    if only[True]:
        text = (
            "Geometry and causal measures disagree: the direction is not shown to turn, but causal measures are named"
        )
        yield f"{text}, for {join_and(only[True])}."
    if only[False]:
        text = "Geometry and causal measures disagree: the direction turned, but no causal measure is named"
        yield f"{text}, so no mechanism follows, for {join_and(only[False])}."
    for objective in probe.objectives:
        yield from _disagreeing_places(probe, objective, formatting.objective_name(objective))


def _turned(cosine: Line) -> bool:
    """Return whether a direction's cosine with the base's is below that of two halves of the base's own prompts."""
    halves, high = cosine["control"], cosine["high"]
    return halves is not None and high is not None and bool(high < halves)


def _both(cosine: Line, area: Line) -> str:
    return f"cosine {cosine['value']:.2f}, AUROC {area['value']:.2f}"


def _disagreeing_places(probe: Probe, objective: str, name: str) -> Iterator[str]:
    """Name the largest patch and the largest part of the update where they differ, and mediation that is not named."""
    patches = _named(_components(probe, "patching", objective, INTO_CHECKPOINT))
    parts = _named(_components(probe, "leave-one-out", objective))
    if patches and parts and (first := _at(patches[0])) != (second := _at(parts[0])):
        where = f"patching names the {place(*first)} first, leaving out parts of the update the {place(*second)}"
        yield f"{name}: {where}."
    own = probe.at("mediation")
    own = own[(own["objective"] == objective) & own["value"].notna() & ~own["named"].astype(bool)]
    if patches and len(own):
        settings = join_and([formatting.attack_name(d) for d in own["detail"]])
        text = f"{name}: patching is named, but mediation by the refusal direction is not ({settings})"
        yield f"{text}: the change need not pass through this direction."


def _at(c: Line) -> tuple[int, str]:
    return c["layer"], c["site"]


def _depth(probe: Probe) -> Iterator[str]:
    """Report KL in the answer's opening and later, along harmful and harmless answers."""
    own = probe.at("token-kl").dropna(subset=["value", "low"])  # tokens that few answers reach have no interval
    if own.empty:
        return
    own = own.assign(opening=answer_token(own) <= OPENING)
    mean = own.groupby(["objective", "detail", "opening"])["value"].mean()
    each = []
    for objective in probe.objectives:
        parts = []
        for kind in ("harmful", "harmless"):
            keys = [(objective, f"{kind} answers", opening) for opening in (True, False)]
            if all(key in mean.index for key in keys):
                first, later = (formatting.nats(float(mean[key]), sign=False) for key in keys)
                parts.append(f"{kind} {first} and {later}")
        each += [f"{formatting.objective_name(objective)} {', '.join(parts)}"] if parts else []
    if each:
        yield (
            f"KL to the base per answer token, in tokens 1–{OPENING} and in later ones, along harmful and harmless "
            f"answers: {'; '.join(each)} nats (means of the curve, without a test)."
        )


def _predicted(probe: Probe) -> Iterator[str]:
    """Say how often the training data's projection had the sign of the trait's change at the largest budget."""
    own = probe.predicted
    if own.empty:
        return
    own = own[own["budget"] == own["budget"].max()]
    ranks = own.drop_duplicates("objective")["rank_correlation"].dropna()
    correlation = f"; rank correlation over traits {ranks.min():.2f} to {ranks.max():.2f}" if len(ranks) else ""
    yield (
        f"Before training: the projection of the training answers along a trait’s vector had the sign of the change "
        f"in endorsement in {int(own['agrees'].sum())} of {len(own)} pairs of objective and trait{correlation}."
    )


def answer_token(lines: pd.DataFrame) -> pd.Series[int]:
    """Return the answer token, from 1, of lines of `token-kl` (position `answer 3`)."""
    return lines["position"].str.removeprefix("answer ").astype(int)


def origin(probe: Probe) -> str:
    """Say on which prompts and with which direction the probe was made, as far as the manifest does."""
    parts, facts = [], probe.facts
    test = mapping(mapping(mapping(facts.get("prompts")).get("n")).get("test"))
    if test:
        parts.append(join_and([f"{n} {kind}" for kind, n in test.items()]) + " test prompts")
    origins = mapping(mapping(facts.get("prompts")).get("origins"))
    parts += [f"{kind}: {text}" for kind, text in origins.items()]
    if "layer" in probe.direction:
        parts.append(f"refusal direction of layer {probe.layer + 1} of {probe.layers}, position {probe.position}")
    if version := mapping(facts.get("openings")).get("version"):
        parts.append(f"refusal openings version {version}")
    if facts.get("persona"):
        parts.append(f"persona vectors from {facts['persona']}")
    return formatting.capitalize_first("; ".join(parts)) + "." if parts else ""
