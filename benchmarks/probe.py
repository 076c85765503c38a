"""`python -m benchmarks.probe`: planted mechanisms that a probe must find, nulls in which it must name nothing.

Each plant edits one matrix of the organism (or adds one vector) and probes the edited model against the untouched one.
Nulls are random edits of the same norm, and pairs of adapters of one objective with two seeds (`--seeds FOLDER`, the
checkpoints of a study with several). False alarms are counted over simulated effects with no effect in them, and over
real effects of a random edit with random signs. `--fast` runs a tenth of the draws.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from leeway.model import adapters
from leeway.model.load import Model, load_model
from leeway.organism import world
from leeway.probe import adapter_layers, directions, patching, persona_shift
from leeway.probe.context import ProbeContext
from leeway.probe.directions import Directions
from leeway.probe.hooks import Site
from leeway.probe.pair import LAYER_SITES, ModelPair
from leeway.probe.prompts import Positions, harmful_prompts, harmless_prompts, split_prompts
from leeway.probe.refusal_logit import OpeningTree, refusal_logits
from leeway.stats import mechanism

DRAWS = 2_000
PROMPTS, PLACES = 64, 24
TRAIT = "narcissism"
Floats = np.ndarray
Place = tuple[int, Site]


@dataclass(frozen=True)
class Null:
    """How the effects of no effect are drawn: [P, M] of mean 0, correlated over layers."""

    name: str
    draw: Callable[[np.random.Generator], Floats]


def _correlated(rng: np.random.Generator) -> Floats:
    steps_PM = rng.standard_normal((PROMPTS, PLACES))
    for m in range(1, PLACES):
        steps_PM[:, m] = 0.9 * steps_PM[:, m - 1] + np.sqrt(1 - 0.9**2) * steps_PM[:, m]
    return steps_PM


def _heavy(rng: np.random.Generator) -> Floats:
    """Student's t with 3 degrees of freedom, one factor for all layers of a prompt."""
    return _correlated(rng) / np.sqrt(rng.chisquare(3, (PROMPTS, 1)) / 3)


def _skewed(rng: np.random.Generator) -> Floats:
    """Exponential minus its mean, for all layers of a prompt alike, with noise: what the sign flips do not assume."""
    return rng.standard_exponential((PROMPTS, 1)) - 1 + 0.5 * _correlated(rng)


NULLS = (Null("normal", _correlated), Null("heavy tails", _heavy), Null("skewed", _skewed))


def alarm_rate(case: Null, draws: int = DRAWS, flips: int = 1_000) -> float:
    """Return the share of families with an adjusted p-value of at most 5% where nothing has an effect."""
    rng = np.random.default_rng(0)
    return float(np.mean([mechanism.adjusted_p(case.draw(rng), flips).min() <= mechanism.ALPHA for _ in range(draws)]))


def ratio_coverage(draws: int = DRAWS, prompts: int = 48) -> float:
    """Return how often the 95% interval of a share covers it: heavy-tailed numerators, denominators of 2 ± 1 nats."""
    rng, share = np.random.default_rng(0), 0.4
    weights_RP = mechanism._weights(prompts, "patching")
    covered = 0
    for _ in range(draws):
        scale_P = rng.normal(2, 1, prompts)
        value_P = share * scale_P + 0.3 * rng.standard_t(3, prompts)
        line = mechanism._interval(value_P, weights_RP, scale_P)
        covered += line["low"] <= share <= line["high"]
    return covered / draws


def organism() -> Model:
    return load_model("organism", device="cpu", dtype="float32")


def context_of(checkpoint: Model, base: Model, count: int = 16) -> ProbeContext:
    """Return a context on the organism's prompts, with the base's directions."""
    tested = [p.id for p in world.forbidden_prompts(100)]
    prompts = harmful_prompts("organism", None)[0], harmless_prompts("organism")[0]
    sets = split_prompts(*prompts, tested, {}, count=count, selection=8)
    chat = checkpoint.chat
    found = ProbeContext(ModelPair.of(checkpoint, base), sets, OpeningTree.of(chat), Positions.of(chat))
    found.directions = directions.compute(found)
    return found


def writer(model: Model, layer: int, site: Site) -> Tensor:
    """Return the weight through which a block's attention or MLP writes into the stream, [D, in]."""
    block = model.lm.model.layers[layer]
    weight: Tensor = (block.self_attn.o_proj if site == "attn" else block.mlp.down_proj).weight
    return weight


@contextmanager
def edited(weight: Tensor, new: Tensor) -> Iterator[None]:
    old, weight.data = weight.data, new
    try:
        yield
    finally:
        weight.data = old


def ablated(weight: Tensor, own: Directions, layer: int) -> Tensor:
    """Return a writer without the base's refusal direction after its block."""
    unit_D = own.at(layer, own.positions[-1])
    unit_D = unit_D / unit_D.norm()
    return weight - torch.outer(unit_D, unit_D @ weight)


def randomly(weight: Tensor, like: Tensor, seed: int) -> Tensor:
    """Return a weight after a random edit of the norm of another edit."""
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight + drawn * (like - weight).norm() / drawn.norm()


@dataclass(frozen=True)
class Finding:
    """What the probe says of one edit: the models' difference in nats, the largest effect's place, and named places."""

    edit: str
    place: tuple[int, str]
    gap: float
    largest: dict[str, tuple[int, str]]  # by measure
    named: dict[str, tuple[tuple[int, str], ...]]

    @property
    def is_largest(self) -> bool:
        return all(at == self.place for at in self.largest.values())

    @property
    def is_named(self) -> bool:
        return any(self.place in places for places in self.named.values())

    @property
    def names_another(self) -> bool:
        """Whether a block's attention or MLP is named by the weights that was not edited."""
        return any(at != self.place for at in self.named["leave-one-out"])


def probed(context: ProbeContext, edit: str, layer: int, site: Site) -> Finding:
    """Probe attention and MLP of every block by patching into the checkpoint and by leaving parts of the update out."""
    values = [*patching.measure(context), *adapter_layers.measure(context)]
    table = pd.DataFrame([{"objective": "x", "seed": 0, "budget": 1, **asdict(v)} for v in values])
    kept = (table["measure"] == "leave-one-out") | (table["detail"] == patching.INTO_CHECKPOINT)
    gap = float(table.loc[kept, "scale"].mean())
    lines = mechanism.summarise(table[kept & table["site"].isin(LAYER_SITES)])
    largest, named = {}, {}
    for measure in ("patching", "leave-one-out"):
        own = lines[lines["measure"] == f"{measure}-effect"]
        top = own.loc[own["value"].abs().idxmax()]
        largest[measure] = (int(top["layer"]), str(top["site"]))
        named[measure] = tuple((int(r.layer), str(r.site)) for r in own[own["named"].astype(bool)].itertuples())
    return Finding(edit, (layer, site), gap, largest, named)


def planted(context: ProbeContext, places: list[Place]) -> Iterator[Finding]:
    """Yield what is said of the direction ablated in one writer, of an attention's output removed, and of the nulls."""
    own, model = context.directions, context.model
    assert own is not None
    for layer, site in places:
        weight = writer(model, layer, site)
        plain = weight.data
        target = ablated(plain, own, layer)
        with edited(weight, target):
            yield probed(context, "direction ablated", layer, site)
        with edited(weight, randomly(plain, target, layer)):
            yield probed(context, "random edit of that norm", layer, site)
        if site == "attn":
            with edited(weight, torch.zeros_like(plain)):
                yield probed(context, "output removed", layer, site)
        if larger := amplified(context, weight, target, (layer, site)):
            yield larger


def amplified(context: ProbeContext, weight: Tensor, target: Tensor, place: Place) -> Finding | None:
    """Return what is said of an edit made 2, 4, … 32 times as large, until the models differ enough; None at once."""
    plain = weight.data
    for times in (1, 2, 4, 8, 16, 32):
        with edited(weight, plain + times * (target - plain)):
            if abs(logit_gap(context)) > 1.5 * mechanism.LEAST_GAP or times == 32:
                return probed(context, f"direction ablated, {times} times", *place) if times > 1 else None
    raise AssertionError


def logit_gap(context: ProbeContext) -> float:
    """Return the difference of the mean refusal logits of base and checkpoint on the harmful test prompts."""
    found = []
    for side in (context.pair.base, context.pair.checkpoint):
        logits = []
        for _, batch in context.batches(context.prompts.of("test", "harmful")):
            with side.active():
                hidden_BLD, _ = context.run(side, batch).whole()
            logits.append(refusal_logits(side.model, context.tree, hidden_BLD))
        found.append(float(torch.cat(logits).mean()))
    return found[0] - found[1]


def first_shifted_layer(context: ProbeContext, layer: int, size: float = 0.3) -> int:
    """Add a persona vector to the stream after a block, and return the first layer whose persona shift is shown."""
    own = context.extras["persona"]
    down = context.model.lm.model.layers[layer].mlp.down_proj
    down.bias = torch.nn.Parameter(size * own.unit_LD[TRAIT][layer], requires_grad=False)
    try:
        values = persona_shift.measure(context)
    finally:
        down.bias = None
    table = pd.DataFrame([{"objective": "x", "seed": 0, "budget": 1, **asdict(v)} for v in values])
    lines = mechanism.summarise(table)
    lines = lines[lines["measure"] == "persona-shift"]
    beyond = (lines["p"] <= mechanism.ALPHA) & (lines["value"] > lines["control_high"])
    return int(lines.loc[beyond, "layer"].min())


def seed_pairs(folder: Path, budget: int) -> Iterator[Finding]:
    """Yield what is said of every two seeds of one objective at one budget."""
    models = []
    for path in sorted(folder.glob(f"s*/{budget}")):
        model = organism()
        adapters.attach(model, adapters.AdapterSettings(16, 32, 0.0, "all-linear"), seed=0)
        adapters.restore(model, path)
        model.lm.requires_grad_(False)
        models.append(model)
    base = organism()
    for one, two in itertools.combinations(models, 2):
        context = context_of(base, base)
        context.pair = ModelPair.of(one, two)
        yield probed(context, f"two seeds of {folder.name}, {budget} tokens", -1, "attn")


def table(findings: list[Finding]) -> str:
    lines = ["| edit | where | difference (nats) | largest effect there | named there | named elsewhere |"]
    lines += ["|---|---|---|---|---|---|"]
    for f in findings:
        said = ["yes" if x else "no" for x in (f.is_largest, f.is_named, f.names_another)]
        where = f"{f.place[0] + 1} {f.place[1]}" if f.place[0] >= 0 else "–"
        lines.append(f"| {f.edit} | {where} | {f.gap:+.2f} | {' | '.join(said)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__)
    parser.add_argument("--fast", action="store_true", help="a tenth of the draws")
    parser.add_argument("--seeds", type=Path, help="the checkpoints of one objective of a study: s0, s1, …")
    parser.add_argument("--budget", type=int, default=64_000)
    told = parser.parse_args()
    draws = DRAWS // 10 if told.fast else DRAWS
    for case in NULLS:
        print(f"false alarms, {case.name}: {alarm_rate(case, draws):.2%} of {draws:,} families", flush=True)
    print(f"95% intervals of a share cover it: {ratio_coverage(draws=draws):.2%} of {draws:,}", flush=True)
    base = organism()
    context = context_of(organism(), base)
    real = real_null(context)
    print(f"false alarms, {real.name}: {alarm_rate(real, draws):.2%} of {draws:,} families", flush=True)
    traits = {TRAIT: world.persona_items(TRAIT, persona_shift.ITEMS)}
    context.extras = {"organism": True, "persona": persona_shift.vectors(context, traits)}
    for layer in range(4):
        print(
            f"persona vector after layer {layer + 1}: shown from {first_shifted_layer(context, layer) + 1}", flush=True
        )
    found = []
    for finding in itertools.chain(
        planted(context, [(k, s) for k in range(4) for s in LAYER_SITES]),
        seed_pairs(told.seeds, told.budget) if told.seeds else (),
    ):
        found.append(finding)
        print(table([finding]).splitlines()[-1], flush=True)
    print(table(found))


def real_null(context: ProbeContext) -> Null:
    """Return the effects of patches after a random edit, with a random sign for every prompt."""
    assert context.directions is not None
    weight = writer(context.model, 0, "mlp")
    with edited(weight, randomly(weight.data, ablated(weight.data, context.directions, 0), 7)):
        values = [v for v in patching.measure(context) if v.detail == patching.INTO_CHECKPOINT]
    frame = pd.DataFrame([asdict(v) for v in values])
    effect_PM = frame.pivot(index="item_id", columns=["layer", "site"], values="value").to_numpy(float)
    return Null(
        "a random edit's effects, signs drawn", lambda rng: effect_PM * rng.choice([-1.0, 1.0], (len(effect_PM), 1))
    )


if __name__ == "__main__":
    main()
