"""Cost formulas of a plan: seconds, memory, disk and dollars from token counts and a machine's rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from leeway.data.chat import Chat
from leeway.evals.eval import Eval, user_message
from leeway.generation.backend import Conversation
from leeway.judges import GUARDS
from leeway.model.load import resolve
from leeway.plan.hardware import Machine
from leeway.study.prepare import Prepared

FLOAT32, ADAM = 4, 8  # bytes per number; per parameter, AdamW's two moments
ROW_BYTES = 600  # per response in rows.parquet and its parts
MEAN_ANSWER = 0.5  # assumed length of a response, also of a judge's, as a share of max_new_tokens
GIB = 2**30
RUNTIME = 0.6 * GIB  # of a process before any model: libraries, allocator
PUBLISHED = 2  # bytes per weight in the hub's files
# Of a CPU with the fused layout, fitted to SmolLM2-135M in bfloat16 and the organism in float32:
PASSES = 30  # times that a training step reads or writes a byte of its element-wise passes
STEP = 3e-3  # seconds a layer and optimiser step take besides, whatever the number of tokens
HELD = 1.5  # bytes that a process holds per byte kept: buffers, the head's blocks, gaps between freed pieces
DECODED = 4000  # bytes of element-wise passes per layer, generated token and number in a hidden state


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as costs depend on them.

    `body`: parameters in the matrix products of every token; `head`: those of tokens with logits; `adapted`: input
    features of all adapted layers together. `fused`: the layout that keeps a shared input, and a pair's shared
    beginning, once.
    """

    total: int
    trained: int
    body: int
    head: int
    layers: int
    hidden: int
    inner: int
    queries: int  # heads * head_dim
    keys: int  # key heads * head_dim
    adapted: int
    full: bool
    bytes: int  # per weight
    heads: int
    fused: bool = False

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values per token."""
        return 2 * self.layers * self.keys * self.bytes

    @property
    def weight_bytes(self) -> int:
        return self.total * self.bytes


def shape(
    lm: Any, layers: Sequence[torch.nn.Linear], rank: int, *, full: bool, width: int, fused: bool = False
) -> Shape:
    """Return the sizes of a model without weights; an adapter of `rank` changes `layers`."""
    config = lm.config.get_text_config()
    total = sum(p.numel() for p in lm.parameters())
    head = lm.get_output_embeddings().weight.numel()
    embedding = lm.get_input_embeddings().weight.numel()
    heads = config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    return Shape(
        total=total,
        trained=total if full else sum(rank * (m.in_features + m.out_features) for m in layers),
        body=total - embedding - (0 if tied else head),
        head=head,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        queries=heads * per_head,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * per_head,
        adapted=sum(m.in_features for m in layers),
        full=full,
        bytes=width,
        heads=heads,
        fused=fused,
    )


def training_seconds(
    s: Shape, m: Machine, tokens: int, targets: int, *, steps: int = 0, dropout: float = 0.0, divergence: bool = False
) -> float:
    """Return the seconds of optimiser steps without their reference; the head runs at target positions only.

    Per weight and token: 2 FLOPs forward, 2 for the inputs' gradients, 2 for the weights' own if they train (an
    adapter's do, the frozen ones under it do not); 4 more of the head for a `divergence` from a distribution. The
    attention products of tokens with tokens are left out (under 1% at a few hundred tokens).
    """
    back = 4 if s.full else 2
    body = tokens * ((2 + back) * s.body + (0 if s.full else 6 * s.trained))
    head = targets * (2 + back + (4 if divergence else 0)) * s.head
    besides = steps * s.layers * STEP if m.is_cpu else 0.0
    return body / m.flops + head / m.head + tokens * pass_bytes(s, dropout) * PASSES / m.passes + besides


def forward_seconds(s: Shape, m: Machine, tokens: int, measured: int) -> float:
    """Return the seconds of forward passes: the body for every token, the head for `measured` tokens."""
    passes = tokens * pass_bytes(s, 0.0) * PASSES / 3 / m.passes  # of which training has two more, backward
    return tokens * 2 * s.body / m.flops + measured * 2 * s.head / m.head + passes


@dataclass(frozen=True)
class EvalCost:
    """One eval at one checkpoint: prompts are counted, response lengths assumed."""

    name: str
    answers: int
    prompt_tokens: int
    max_new_tokens: int  # 0: one forward pass per prompt
    answer_tokens: float
    judge: str = ""
    judge_calls: int = 0
    judge_tokens_in: float = 0.0
    judge_tokens_out: float = 0.0


def eval_seconds(s: Shape, e: EvalCost, m: Machine, batch: int) -> float:
    """Return the seconds of an eval: prompts in forward passes, then decoding steps.

    On a GPU a step takes the longer of reading weights, keys and values and computing, and a batch lasts
    `max_new_tokens` steps. On a CPU finished rows leave the batch; a token computes, passes over states, reads a cache.
    """
    reading = forward_seconds(s, m, e.prompt_tokens, e.answers)
    if not e.max_new_tokens or not e.answers:
        return reading
    context = e.prompt_tokens / e.answers + e.max_new_tokens / 2
    together = min(batch, e.answers)
    if m.is_cpu:
        token = 2 * s.body / m.decoding + 2 * s.head / m.head + s.layers * s.hidden * DECODED / m.passes
        return reading + e.answer_tokens * (token + context * s.kv_bytes / m.bandwidth)
    token = 2 * (s.body + s.head) / m.decoding
    steps = math.ceil(e.answers / batch) * e.max_new_tokens
    moving = (s.weight_bytes + together * context * s.kv_bytes) / m.bandwidth
    return reading + steps * max(together * token, moving)


@dataclass(frozen=True)
class Memory:
    """Bytes of weights and adapter, plus activations (training) and the key-value cache (generation).

    Not at once, unless the process `keeps` what it frees, as on a CPU.
    """

    weights: float
    adapter: float
    activations: float
    cache: float
    keeps: bool = False

    @property
    def peak(self) -> float:
        parts = self.activations, self.cache
        return self.weights + self.adapter + (sum(parts) if self.keeps else max(parts))


def kept_bytes(s: Shape, dropout: float) -> int:
    """Return the bytes per token that training keeps for the backward pass.

    The fused layout keeps both norms' inputs, queries, keys, values and the attention output, and two MLP vectors, and
    computes the rest again.
    """
    attention = s.bytes * 2 * (s.queries + s.keys)
    return s.layers * (attention + s.bytes * 2 * (s.hidden + s.inner)) if s.fused else pass_bytes(s, dropout)


def pass_bytes(s: Shape, dropout: float) -> int:
    """Return the bytes per token that element-wise passes write.

    A layer's are both norms twice in float32, queries, keys, values and the attention output, and three MLP vectors;
    in the fused layout each product's input once; with peft every adapted layer's in float32, with a dropout mask.
    """
    norms, attention = 16 * s.hidden, s.bytes * 2 * (s.queries + s.keys)
    inputs = s.adapted * (s.bytes if s.full else FLOAT32 + (1 if dropout else 0))
    if s.fused:
        inputs = s.layers * s.bytes * (2 * s.hidden + s.queries + s.inner)
    return s.layers * (norms + attention + s.bytes * 3 * s.inner) + inputs


def memory(s: Shape, micro_tokens: int, dropout: float, batch: int, context: int, length: float = 0.0) -> Memory:
    """Return the memory with adapter, gradient and AdamW moments in float32 and no activation recomputed.

    `length`: tokens of an example. The fused layout keeps each token's attention to them. `context`: of a response.
    HELD is in the fused layout alone: on a GPU the allocator reuses its blocks, and on the organism in float32 autograd
    kept 1.18 times the estimate.
    """
    trained = s.trained * (FLOAT32 + ADAM) + (0 if s.full else s.trained * FLOAT32)
    each = kept_bytes(s, dropout) + (s.layers * s.heads * length * s.bytes if s.fused else 0)
    held = HELD if s.fused else 1.0
    return Memory(s.weight_bytes, trained, held * micro_tokens * each, batch * context * s.kv_bytes, keeps=s.fused)


def eval_costs(prepared: Prepared) -> tuple[tuple[EvalCost, ...], tuple[str, ...]]:
    """Return the cost of each eval at one checkpoint, and notes on what is not counted."""
    found, jailbreak = tuple(eval_cost(e, prepared.chat) for e in prepared.evals), prepared.spec.evals.jailbreak
    notes = []
    if jailbreak is not None:
        if jailbreak.translator is not None:
            notes.append("the zulu attack's translations, out and back")
        if any(a.startswith("crescendo") for a in jailbreak.attacks):
            notes.append("further turns of multi-turn attacks, and the attacker model")
        if any(j.name == "finetuned" for j in jailbreak.judge):
            notes.append("the fine-tuned judge's forward passes")
        if guards := [j.name for j in jailbreak.judge if j.name in GUARDS]:
            notes.append(f"the replies of {' and '.join(guards)}")
    notes += [f"{e.name}, its prompts are not known before the run" for e in found if not e.prompt_tokens]
    return found, tuple(f"not priced: {note}" for note in notes)


def pair_cost(prepared: Prepared) -> EvalCost | None:
    """Return the most that sampling rejected responses can take; None if the pairs exist."""
    if prepared.pairs is not None:
        return None
    pairs = prepared.spec.pairs
    each = sum(len(prepared.chat.prompt_ids(user_message(e.prompt))) for e in prepared.auxiliary_pool.task)
    answers = prepared.examples * pairs.samples
    drawn = answers * MEAN_ANSWER * pairs.max_new_tokens
    return EvalCost("pairs", answers, each * pairs.samples, pairs.max_new_tokens, drawn)


def memory_needed(prepared: Prepared, size: Shape) -> Memory:
    """Return the memory of a study; the context is the longest prompt of any eval plus its answer at its limit."""
    spec, prompts = prepared.spec, (p for e in prepared.evals for p in e.prompts())
    longest = max((len(prepared.chat.prompt_ids(p.conversation)) + p.max_new_tokens for p in prompts), default=0)
    schedules = prepared.schedules.values()
    length = max((s.stops[-1].source_tokens / sum(map(len, s.steps)) for s in schedules), default=0.0)
    return memory(size, spec.optim.micro_tokens, spec.adapter.dropout, spec.evals.batch, longest, length)


def eval_cost(e: Eval, chat: Chat) -> EvalCost:
    """Return the cost of one eval at one checkpoint, its judges' requests included."""
    count = cache(lambda text: len(chat.ids(text)))

    def contents(conversation: Conversation) -> int:
        return sum(count(m["content"]) for m in conversation)  # the judge's own template is not known

    prompts, judging = list(e.prompts()), list(e.judge_requests())
    limit = max((p.max_new_tokens for p in prompts), default=0)
    return EvalCost(
        name=e.key,
        answers=len(e),
        prompt_tokens=sum(p.samples * len(chat.prompt_ids(p.conversation)) for p in prompts),
        max_new_tokens=limit,
        answer_tokens=sum(p.samples * p.max_new_tokens for p in prompts) * MEAN_ANSWER,
        judge=" and ".join(dict.fromkeys(name for name, _ in judging)),
        judge_calls=len(judging),
        judge_tokens_in=float(sum(contents(r.conversation) + int(MEAN_ANSWER * limit) for _, r in judging)),
        judge_tokens_out=sum(MEAN_ANSWER * r.max_new_tokens for _, r in judging),
    )


@dataclass(frozen=True)
class Prices:
    """Dollars per GPU hour, and per million input and output tokens of a judge."""

    hour: float | None = None
    judge: tuple[float, float] | None = None


@dataclass(frozen=True)
class CostEstimate:
    """Hours, memory and disk in GiB; dollars are None without a price.

    `hours` of the run with all `workers`; those of each part are summed over workers.
    """

    machine: str
    assumed: str
    workers: int
    hours: float
    training_hours: float
    answering_hours: float
    pairs_hours: float
    memory: Memory
    fits: bool | None
    advice: str
    adapters_gib: float
    references_gib: float
    hub_gib: float
    disk_gib: float
    judge_calls: int
    judge_tokens_in: float
    judge_tokens_out: float
    dollars: float | None
    judge_dollars: float | None

    @property
    def memory_gib(self) -> float:
        """Return the memory of all processes: several workers have a coordinating one, which loads the model.

        While a model is loaded, its file's pages and its weights are both in memory.
        """
        leading = RUNTIME + 2 * self.memory.weights if self.workers > 1 else 0.0
        return (self.workers * (RUNTIME + self.memory.peak) + leading) / GIB

    def lines(self) -> Iterator[str]:
        pairs = f", sampling pairs {as_time(self.pairs_hours)} at most" if self.pairs_hours else ""
        several = f" with {self.workers} workers" if self.workers > 1 else ""
        together = ", over all workers" if several else ""
        yield (
            f"estimated by formulas on {self.machine}{several}, not measured: {as_time(self.hours)} (training "
            f"{as_time(self.training_hours)}, generation {as_time(self.answering_hours)}{pairs}{together})"
        )
        yield f"  assumed: {self.assumed}; an answer takes {MEAN_ANSWER:.0%} of max_new_tokens; judge time is excluded"
        m = self.memory
        each = "each worker: " if several else ""
        fit = {None: "", True: ": fits", False: f": DOES NOT FIT; {self.advice}"}[self.fits]
        yield (
            f"  memory ~{self.memory_gib:.1f} GiB{fit} ({each}weights {m.weights / GIB:.1f}, adapter and optimiser "
            f"{m.adapter / GIB:.1f}, activations and buffers {m.activations / GIB:.1f}, keys and values "
            f"{m.cache / GIB:.1f}{', both kept' if m.keeps else ', not at once'})"
        )
        yield from self.other_lines()

    def other_lines(self) -> Iterator[str]:
        """Yield disk, judges and GPU rent, which `--measure` does not time."""
        hub = f", the hub's files {self.hub_gib:.1f}" if self.hub_gib else ""
        kept = f", references {self.references_gib:.2f}" if self.references_gib else ""
        yield f"  disk ~{self.disk_gib:.2f} GiB (checkpoints {self.adapters_gib:.2f}{kept}{hub})"
        if self.judge_calls:
            read, written = self.judge_tokens_in / 1e6, self.judge_tokens_out / 1e6
            yield (
                f"  judges: up to {self.judge_calls:,} calls, ~{read:.1f} million tokens read and "
                f"~{written:.1f} million written{_dollars(self.judge_dollars, '--judge-price')}"
            )
        if self.fits is not None:
            yield f"  GPU rental{_dollars(self.dollars, '--price')}"


def as_time(hours: float) -> str:
    return f"~{hours:.1f} h" if hours >= 1 else f"~{hours * 60:.1f} min"


def _dollars(amount: float | None, option: str) -> str:
    return f": no price given ({option})" if amount is None else f": ~${amount:,.2f}"


def estimate_cost(
    prepared: Prepared,
    size: Shape,
    machine: Machine,
    prices: Prices,
    *,
    training: float,
    sweeps: float,
    evals: Sequence[EvalCost],
    evaluated: Mapping[str, int],
    disk: float,
    references: float,
) -> CostEstimate:
    """Return the estimate from seconds (`training`, `sweeps`) and bytes (`references`, `disk` for all else).

    `evaluated`: how many models each eval measures.
    """
    spec, pairs = prepared.spec, pair_cost(prepared)
    batch, hour, judge = spec.evals.batch, prices.hour, prices.judge
    answering = sum(evaluated[e.name] * eval_seconds(size, e, machine, batch) for e in evals)
    needed = memory_needed(prepared, size)
    drawn = eval_seconds(size, pairs, machine, batch) if pairs else 0.0
    calls = sum(evaluated[e.name] * e.judge_calls for e in evals)
    read = sum(evaluated[e.name] * e.judge_tokens_in for e in evals)
    written = sum(evaluated[e.name] * e.judge_tokens_out for e in evals)
    hub = 0.0 if Path(resolve(spec.model)).is_dir() else size.total * PUBLISHED / GIB
    hours = [seconds / 3600 for seconds in (training, answering + sweeps, drawn)]
    adapters = disk / GIB
    return CostEstimate(
        machine=machine.name,
        assumed=machine.assumed,
        workers=1,
        hours=sum(hours),
        training_hours=hours[0],
        answering_hours=hours[1],
        pairs_hours=hours[2],
        memory=needed,
        fits=None if machine.memory is None else RUNTIME + needed.peak <= machine.memory,
        advice="lower optim.micro_tokens" if needed.activations > needed.cache else "lower evals.batch",
        adapters_gib=adapters,
        references_gib=references / GIB,
        hub_gib=hub,
        disk_gib=adapters + references / GIB + hub,
        judge_calls=calls,
        judge_tokens_in=read,
        judge_tokens_out=written,
        dollars=None if hour is None else hour * sum(hours),
        judge_dollars=None if judge is None else (judge[0] * read + judge[1] * written) / 1e6,
    )
