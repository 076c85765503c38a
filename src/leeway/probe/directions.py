"""The refusal direction: difference in means, and the choice of layer and position by its causal effects.

Arditi et al. 2024 (arXiv 2406.11717, §2.3): r_ℓ = mean h_ℓ(harmful) − mean h_ℓ(harmless) in float64, at each position
from the instruction's last token on. Among all (ℓ, position) with ℓ < 0.8 · depth the chosen one has the lowest mean
refusal logit under ablation on harmful prompts, if

- ablating it moves the next-token distribution on harmless prompts by at most 0.1 nats (KL), and
- adding it at its layer makes harmless prompts refused (their mean refusal logit rises above 0, or if no candidate
  reaches that, above the middle of harmful and harmless prompts).

If no candidate passes, the one with the smallest KL is taken among those that work both ways: ablation brings the
logit below that middle, addition above it. `limits` then says what it fails, and the page repeats it.

Zhao et al. 2025 (arXiv 2507.11878): at the instruction's last token the same difference is about harmfulness, at the
template's last token about refusal. Both are kept for every layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leeway.errors import LeewayError, first_line
from leeway.io import atomic_write
from leeway.probe.context import ProbeContext, states
from leeway.probe.hooks import Edit, Point, ablate_everywhere, addition
from leeway.probe.pair import Side
from leeway.probe.prompts import ProbePrompt
from leeway.probe.refusal_logit import refusal_logits

VERSION = 1
DEPTH = 0.8  # candidates lie below this share of the layers
MAX_KL = 0.1  # nats, on harmless prompts
HALF = 0.5  # of the gap between harmful and harmless prompts: a direction works if it closes so much of it, both ways
FINALISTS = 12  # candidates measured on all selection prompts
SCREEN = 8  # prompts of each kind that choose the finalists among three times as many


@dataclass(frozen=True)
class Candidate:
    """One (layer, position) with its effects on the selection prompts, logits and KL in nats."""

    layer: int
    position: str
    ablated: float  # mean refusal logit of harmful prompts with the direction ablated
    induced: float  # mean refusal logit of harmless prompts with the direction added
    kl: float  # mean KL(plain || ablated) of the next token on harmless prompts
    allowed: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Directions:
    """The base's refusal directions: one difference in means per layer and position, and the chosen one.

    mean_LPD: harmful minus harmless, float32, [layers, positions, D]. `norm_LP`: mean norm of the states there.
    """

    mean_LPD: Tensor
    norm_LP: Tensor
    positions: tuple[str, ...]
    layer: int
    position: str
    table: tuple[Candidate, ...]
    model_hash: str
    prompts_hash: str
    openings_hash: str
    plain: tuple[float, float]  # mean refusal logit of harmful, harmless selection prompts

    @property
    def limits(self) -> str:
        """Which of the criteria the chosen direction fails; empty if none."""
        own = next(c for c in self.table if c.chosen)
        if own.allowed:
            return ""
        what = f"no direction meets the criteria; the chosen one moves harmless prompts by KL {own.kl:.2f} (at most "
        return what + f"{MAX_KL}) and adding it gives them a refusal logit of {own.induced:.2f} (above 0)"

    @property
    def unit_D(self) -> Tensor:
        """The chosen direction at length 1, [D]."""
        chosen_D: Tensor = self.at(self.layer, self.position)
        unit_D: Tensor = chosen_D / chosen_D.norm()
        return unit_D

    def at(self, layer: int, position: str) -> Tensor:
        found_D: Tensor = self.mean_LPD[layer, self.positions.index(position)]
        return found_D

    def save(self, path: Path) -> None:
        """Write safetensors: the tensors, and everything else as JSON in the metadata."""
        facts = {k: v for k, v in asdict(self).items() if k not in ("mean_LPD", "norm_LP")}
        with atomic_write(path) as scratch:
            save_file(
                {"mean": self.mean_LPD.contiguous(), "norm": self.norm_LP.contiguous()},
                scratch,
                {"leeway_directions": json.dumps({"version": VERSION, **facts}, sort_keys=True)},
            )

    @classmethod
    def load(cls, path: Path) -> Directions:
        """Read a file of `save`. Raises LeewayError."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["leeway_directions"])
                mean_LPD, norm_LP = file.get_tensor("mean"), file.get_tensor("norm")
            if facts.pop("version") != VERSION:
                raise ValueError("another version")
            table = tuple(Candidate(**c) for c in facts.pop("table"))
            positions, plain = tuple(facts.pop("positions")), tuple(facts.pop("plain"))
            found = cls(mean_LPD, norm_LP, positions=positions, table=table, plain=plain, **facts)
            found._require_whole()
            return found
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            what = f"{path}: not a file of directions ({first_line(error)})"
            raise LeewayError(what, fix="give a directions.safetensors that `leeway probe` wrote") from error

    def _require_whole(self) -> None:
        """Raise ValueError where the parts of a file do not fit each other."""
        shape = self.mean_LPD.shape
        if self.mean_LPD.dim() != 3 or self.norm_LP.shape != shape[:2] or len(self.positions) != shape[1]:
            raise ValueError(f"its tensors are {list(shape)} and {list(self.norm_LP.shape)}")
        if not 0 <= self.layer < shape[0] or self.position not in self.positions:
            raise ValueError(f"it names layer {self.layer + 1} at {self.position}, which it lacks")
        if not torch.isfinite(self.mean_LPD).all() or sum(c.chosen for c in self.table) != 1:
            raise ValueError("a direction is not finite, or none is chosen")

    def check(
        self, model_hash: str, width: int, layers: int, positions: Seq[str], *, other_model: bool = False
    ) -> None:
        """Raise LeewayError unless the directions are of this base and template (`other_model`: of its shape)."""
        count, _, size = self.mean_LPD.shape
        if (count, size) != (layers, width):
            what = f"directions: made for {count} layers of width {size}, and the model has {layers} of {width}"
            raise LeewayError(what, fix="give directions of this model's base")
        if self.positions != tuple(positions):
            what = f"directions: made at {len(self.positions)} positions of a template ({', '.join(self.positions)}), "
            what += f"and the template here has {len(positions)} ({', '.join(positions)})"
            raise LeewayError(what, fix="give directions made under this chat template, or leave --directions out")
        if self.model_hash != model_hash and not other_model:
            what = f"directions: made on the model {self.model_hash}, and the base here is {model_hash}"
            raise LeewayError(what, fix="give directions of this base, or leave --directions out to compute them")


def compute(context: ProbeContext) -> Directions:
    """Return the base's directions: means over the direction prompts, and the choice on the selection prompts."""
    side = context.pair.base
    by_kind = [states(context, side, context.prompts.of("direction", kind)) for kind in ("harmful", "harmless")]
    means = [s.double().mean(1) for s in by_kind]
    mean_LPD = (means[0] - means[1]).float()
    norm_LP = torch.cat(by_kind, 1).norm(dim=-1).mean(1)
    table, chosen, plain = choose(context, mean_LPD)
    names = context.positions.names
    hashes = (side.model.hash, context.prompts.hash, context.tree.hash)
    return Directions(mean_LPD, norm_LP, names, chosen.layer, chosen.position, table, *hashes, plain)


def choose(context: ProbeContext, mean_LPD: Tensor) -> tuple[tuple[Candidate, ...], Candidate, tuple[float, float]]:
    """Return (the measured candidates, the chosen one, plain mean logits of harmful and harmless prompts).

    What adding every candidate induces is measured on a few prompts, all effects of the best of them too, and those of
    the finalists on all selection prompts. Raises LeewayError if the best one does not bring the logit of harmful
    prompts below the middle.
    """
    side, names = context.pair.base, context.positions.names
    harmful, harmless = (context.prompts.of("selection", kind) for kind in ("harmful", "harmless"))
    depth = max(1, int(DEPTH * len(mean_LPD)))
    places = [(layer, k) for layer in range(depth) for k in range(len(names))]

    def measure(some: Seq[tuple[int, int]], count: int) -> tuple[list[Candidate], tuple[float, float]]:
        own = _Effects.of(context, side, harmful[:count], harmless[:count])
        found = [own.candidate(layer, names[k], mean_LPD[layer, k]) for layer, k in some]
        return _allow(found, own.plain), own.plain

    if len(places) > FINALISTS and len(harmful) > SCREEN:
        few = _Effects.of(context, side, (), harmless[:SCREEN])
        inducing = sorted(places, key=lambda p: -few.induced(p[0], mean_LPD[p]))[: 3 * FINALISTS]
        screened, plain = measure(inducing, SCREEN)
        ranked = sorted(zip(inducing, screened, strict=True), key=lambda pair: _rank(pair[1], plain))
        places = sorted(place for place, _ in ranked[:FINALISTS])
    table, plain = measure(places, len(harmful))
    best = min(table, key=lambda c: _rank(c, plain))
    if best.ablated > sum(plain) / 2 or plain[0] <= plain[1]:
        what = f"probe: no direction mediates refusal in the base (logit under ablation {best.ablated:.2f} at "
        what += f"layer {best.layer + 1}; plain {plain[0]:.2f} on harmful prompts, {plain[1]:.2f} on harmless ones)"
        raise LeewayError(what, fix="check that the base refuses the harmful prompts and answers the harmless ones")
    marked = tuple(Candidate(**{**asdict(c), "chosen": c is best}) for c in table)
    return marked, next(c for c in marked if c.chosen), plain


def _rank(c: Candidate, plain: tuple[float, float]) -> tuple[int, float]:
    """Order candidates: those that meet all criteria by their ablation, then those that work both ways by their KL.

    The rest by how far they work: the smaller of the two shares of the gap between harmful and harmless prompts that
    ablation and addition close.
    """
    if c.allowed:
        return 0, c.ablated
    gap = plain[0] - plain[1]
    works = min((plain[0] - c.ablated) / gap, (c.induced - plain[1]) / gap) if gap > 0 else 0.0
    return (1, c.kl) if works >= HALF else (2, -works)


def _allow(found: Seq[Candidate], plain: tuple[float, float]) -> list[Candidate]:
    """Mark the candidates that mediate refusal: little change on harmless prompts, and refusal induced by adding."""
    reaches = any(c.induced > 0 and c.kl <= MAX_KL for c in found)
    least = 0.0 if reaches else sum(plain) / 2
    return [
        Candidate(**{**asdict(c), "allowed": c.kl <= MAX_KL and c.induced > least and c.ablated < plain[0]})
        for c in found
    ]


@dataclass
class _Effects:
    """The selection prompts of one model, with their plain logits and next-token distributions."""

    context: ProbeContext
    side: Side
    harmful: Seq[ProbePrompt]
    harmless: Seq[ProbePrompt]
    plain: tuple[float, float]
    logp_HV: Mapping[str, Tensor]

    @classmethod
    def of(cls, context: ProbeContext, side: Side, harmful: Seq[ProbePrompt], harmless: Seq[ProbePrompt]) -> _Effects:
        own = cls(context, side, harmful, harmless, (0.0, 0.0), {})
        refused = own._logits(harmful, {})[0] if harmful else float("nan")
        answered, own.logp_HV = own._logits(harmless, {}, distributions=True)
        own.plain = (refused, answered)
        return own

    def induced(self, layer: int, direction_D: Tensor) -> float:
        """Return the mean refusal logit of the harmless prompts with the direction added after block `layer`."""
        return self._logits(self.harmless, {(layer, "resid"): addition(direction_D)})[0]

    def candidate(self, layer: int, position: str, direction_D: Tensor) -> Candidate:
        edits = ablate_everywhere(self.side.blocks, direction_D / direction_D.norm())
        ablated, _ = self._logits(self.harmful, edits)
        _, logp_HV = self._logits(self.harmless, edits, distributions=True)
        kl = sum(float((p.exp() * (p - logp_HV[i])).sum()) for i, p in self.logp_HV.items()) / len(self.logp_HV)
        return Candidate(layer, position, ablated, self.induced(layer, direction_D), kl)

    def _logits(
        self, prompts: Seq[ProbePrompt], edits: Mapping[Point, Edit], *, distributions: bool = False
    ) -> tuple[float, dict[str, Tensor]]:
        """Return the mean refusal logit, and each prompt's next-token log-probabilities if asked for."""
        total, kept = 0.0, dict[str, Tensor]()
        model, root = self.side.model, len(self.context.tree.nodes)
        for chosen, batch in self.context.batches(prompts):
            with self.side.active():
                hidden_BLD, _ = self.context.run(self.side, batch).whole(everywhere=edits)
            total += float(refusal_logits(model, self.context.tree, hidden_BLD).sum())
            if distributions:
                logp_BV = model.head.logits(hidden_BLD[:, -root]).log_softmax(-1)
                kept |= {p.id: row for p, row in zip(chosen, logp_BV, strict=True)}
        return total / len(prompts), kept
