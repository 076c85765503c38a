"""What tokens cost: FLOPs, seconds, memory, disk. Formulas alone; nothing here is measured on a GPU.

What an eval asks of a checkpoint and of its judges, in tokens: prompts counted, answers assumed.

A plan's bottom line: hours, memory, dollars and disk on one machine, each estimated from stated assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leeway.data.chat import Chat
from leeway.evals.eval import Eval, user_message
from leeway.generation.backend import Conversation
from leeway.hashing import canonical
from leeway.model.load import resolve
from leeway.plan.hardware import Machine
from leeway.study.prepare import Prepared
from leeway.study.spec import Spec

FLOAT32, ADAM = 4, 8  # bytes of a number; of AdamW's two moments
ROW_BYTES = 600  # of rows.parquet and its parts, an answer


@dataclass(frozen=True)
class Shape:
    """A model in the numbers that costs depend on; parameters count as they enter matrix products.

    `body`: of every token. `head`: of tokens whose distribution is asked for. `adapted`: inputs of all layers that an
    adapter changes, numbers a token. `kept`: what a layer keeps for the backward pass beside those.
    """

    total: int
    trained: int
    body: int
    head: int
    layers: int
    hidden: int
    inner: int
    queries: int  # heads times their width
    keys: int  # key heads times their width
    adapted: int
    full: bool
    bytes: int  # of a weight

    @property
    def kv_bytes(self) -> int:
        """Of keys and values, a token."""
        return 2 * self.layers * self.keys * self.bytes

    @property
    def weight_bytes(self) -> int:
        return self.total * self.bytes


def shape(lm: Any, layers: Seq[torch.nn.Linear], rank: int, *, full: bool, width: int) -> Shape:
    """Of a model without weights, `layers` of which an adapter of `rank` changes."""
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
    )


def training_flops(s: Shape, processed: int, targets: int, reference: int) -> float:
    """Of tokens through policy and reference; heads at targets alone, as the streamed head has it.

    Forward 2 a weight and token. Backward 2 again for the inputs' gradients, and 2 for the weights' where they train:
    an adapter's do, the frozen ones beneath it do not. A reference pass is a forward pass alone. Attention's products
    of tokens with tokens are left out (under 1% at a few hundred tokens).
    """
    back = 4 if s.full else 2
    policy = processed * ((2 + back) * s.body + (0 if s.full else 6 * s.trained)) + targets * (2 + back) * s.head
    return policy + reference_flops(s, reference, targets if reference else 0)


def reference_flops(s: Shape, tokens: int, measured: int) -> float:
    """Of a pass forward alone: the body for every token, the head for those that are measured."""
    return tokens * 2 * s.body + measured * 2 * s.head


@dataclass(frozen=True)
class EvalCost:
    """One eval at one checkpoint. Answers and prompts are counted; how long an answer is, is assumed."""

    name: str
    answers: int
    prompt_tokens: int
    max_new_tokens: int  # 0: one forward pass each, no text
    answer_tokens: float
    judge: str = ""
    judge_calls: int = 0
    judge_tokens_in: float = 0.0
    judge_tokens_out: float = 0.0


def eval_seconds(s: Shape, e: EvalCost, machine: Machine, batch: int) -> float:
    """Prompts at the matrix-product rate; then steps, each as long as its slower half: reading weights and keys, or
    computing.

    A batch is taken to last until its longest answer reaches `max_new_tokens`.
    """
    reading = (e.prompt_tokens * 2 * s.body + e.answers * 2 * s.head) / machine.flops
    if not e.max_new_tokens or not e.answers:
        return reading
    if machine.bandwidth is None:  # a CPU, where computing alone counts
        return reading + e.answer_tokens * 2 * (s.body + s.head) / machine.flops
    together = min(batch, e.answers)
    steps = math.ceil(e.answers / batch) * e.max_new_tokens
    computing = together * 2 * (s.body + s.head) / machine.flops
    context = e.prompt_tokens / e.answers + e.max_new_tokens / 2
    moving = (s.weight_bytes + together * context * s.kv_bytes) / machine.bandwidth
    return reading + steps * max(computing, moving)


@dataclass(frozen=True)
class Memory:
    """Bytes: what stands all along, what training adds, and what answering adds."""

    weights: float
    adapter: float
    activations: float
    cache: float

    @property
    def peak(self) -> float:
        return self.weights + self.adapter + max(self.activations, self.cache)


def memory(s: Shape, micro_tokens: int, dropout: float, batch: int, context: int) -> Memory:
    """Adapter, gradient and AdamW's moments in float32; activations of a micro-batch, none of them recomputed.

    A layer keeps, a token: both norms in float32, twice; every adapted layer's input in float32, with a mask of a byte
    where there is dropout; queries, keys, values and attention's output; and three vectors of the MLP. An estimate: it
    leaves out buffers, fragments and the head's chunks. (On the organism in float32, autograd kept 1.18 times that.)
    """
    mask = 1 if dropout and not s.full else 0
    norms, attention = 16 * s.hidden, s.bytes * 2 * (s.queries + s.keys)
    inputs = s.adapted * (s.bytes if s.full else FLOAT32 + mask)
    activations = micro_tokens * (s.layers * (norms + attention + s.bytes * 3 * s.inner) + inputs)
    trained = s.trained * (FLOAT32 + ADAM) + (0 if s.full else s.trained * FLOAT32)
    return Memory(s.weight_bytes, trained, activations, batch * context * s.kv_bytes)


MEAN_ANSWER = 0.5  # of max_new_tokens, of a checkpoint's answer and of a judge's: assumed


def eval_costs(prepared: Prepared) -> tuple[tuple[EvalCost, ...], tuple[str, ...]]:
    """(each eval at one checkpoint, what is left out of the count)."""
    found = tuple(eval_cost(e, prepared.chat) for e in prepared.evals)
    unknown = (f"not priced: {e.name}, its prompts are not known before the run" for e in found if not e.prompt_tokens)
    return found, (*_left_out(prepared.spec), *unknown)


def pair_cost(prepared: Prepared) -> EvalCost | None:
    """What drawing the pairs takes at most; none where they are given or have been drawn."""
    if prepared.pairs is not None:
        return None
    asked = prepared.spec.pairs
    chat, task = prepared.chat, prepared.auxiliary_pool.task
    each = sum(len(chat.prompt_ids(user_message(e.prompt))) for e in task)
    answers = prepared.examples * asked.samples
    drawn = answers * MEAN_ANSWER * asked.max_new_tokens
    return EvalCost("pairs", answers, each * asked.samples, asked.max_new_tokens, drawn)


def longest(prepared: Prepared) -> int:
    """Return the tokens of the longest prompt of any eval plus its answer at its limit."""
    prompts = (p for e in prepared.evals for p in e.prompts())
    return max((len(prepared.chat.prompt_ids(p.conversation)) + p.max_new_tokens for p in prompts), default=0)


def eval_cost(e: Eval, chat: Chat) -> EvalCost:
    """Return the cost of one eval at one checkpoint, its judges' requests included."""
    known: dict[str, int] = {}

    def tokens(conversation: Conversation) -> int:
        text = canonical(conversation)
        if text not in known:
            known[text] = len(chat.prompt_ids(conversation))
        return known[text]

    prompts, judging = list(e.prompts()), list(e.judge_requests())
    limit = max((p.max_new_tokens for p in prompts), default=0)
    answer_tokens = sum(p.samples * p.max_new_tokens for p in prompts) * MEAN_ANSWER
    return EvalCost(
        name=e.key,
        answers=len(e),
        prompt_tokens=sum(p.samples * tokens(p.conversation) for p in prompts),
        max_new_tokens=limit,
        answer_tokens=answer_tokens,
        judge=" and ".join(dict.fromkeys(name for name, _ in judging)),
        judge_calls=len(judging),
        judge_tokens_in=float(sum(tokens(r.conversation) + int(MEAN_ANSWER * limit) for _, r in judging)),
        judge_tokens_out=sum(MEAN_ANSWER * r.max_new_tokens for _, r in judging),
    )


def _left_out(spec: Spec) -> list[str]:
    """What a study asks for and no line prices."""
    found: list[str] = []
    jailbreak = spec.evals.jailbreak
    if jailbreak is not None and jailbreak.translator is not None:
        found.append("not priced: the zulu attack's translations, out and back")
    if jailbreak is not None and any(a.startswith("crescendo") for a in jailbreak.attacks):
        found.append("not priced: a multi-turn attack's further turns, and who leads it")
    if jailbreak is not None and any(j.name == "finetuned" for j in jailbreak.judge):
        found.append("not priced: the fine-tuned judge's forward passes")
    return found


GIB = 2**30
RUNTIME = 0.6 * GIB  # of a process before any model: libraries, allocator
PUBLISHED = 2  # bytes of a weight in the hub's files


@dataclass(frozen=True)
class CostEstimate:
    """Hours of one machine used alone, bytes as GiB; dollars are none where no price was given."""

    machine: str
    assumed: str
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
    def hours(self) -> float:
        return self.training_hours + self.answering_hours + self.pairs_hours

    @property
    def memory_gib(self) -> float:
        return (RUNTIME + self.memory.peak) / GIB

    def lines(self) -> Iterator[str]:
        """By formulas alone."""
        yield from self._estimated()
        yield from self.other_lines()

    def _estimated(self) -> Iterator[str]:
        pairs = f", drawing pairs {as_time(self.pairs_hours)} at most" if self.pairs_hours else ""
        yield (
            f"estimated by formulas on {self.machine}, not measured: {as_time(self.hours)} (training "
            f"{as_time(self.training_hours)}, answering {as_time(self.answering_hours)}{pairs})"
        )
        yield (
            f"  assumed: {self.assumed}; an answer takes {MEAN_ANSWER:.0%} of max_new_tokens; judges are not waited for"
        )
        m = self.memory
        fit = {None: "", True: ": fits", False: f": DOES NOT FIT; {self.advice}"}[self.fits]
        yield (
            f"  memory ~{self.memory_gib:.1f} GiB{fit} (weights {m.weights / GIB:.1f}, adapter and optimiser "
            f"{m.adapter / GIB:.1f}, then activations {m.activations / GIB:.1f} or keys and values {m.cache / GIB:.1f})"
        )

    def other_lines(self) -> Iterator[str]:
        """Disk, judges and hire, which are not timed."""
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
            yield f"  hire{_dollars(self.dollars, '--price')}"


def as_time(hours: float) -> str:
    return f"~{hours:.1f} h" if hours >= 1 else f"~{hours * 60:.1f} min"


def _dollars(amount: float | None, option: str) -> str:
    return f": no price given ({option})" if amount is None else f": ~${amount:,.2f}"


def estimate_cost(
    prepared: Prepared,
    size: Shape,
    machine: Machine,
    *,
    training: float,
    sweeps: float,
    evals: Seq[EvalCost],
    evaluated: int,
    pairs: EvalCost | None,
    disk: float,
    references: float,
    hour: float | None,
    judge: tuple[float, float] | None,
) -> CostEstimate:
    """`training` and `sweeps` in FLOPs; `disk`, of all but references and hub files, and `references` in bytes."""
    spec = prepared.spec
    batch = spec.evals.batch
    asked = evaluated * sum(eval_seconds(size, e, machine, batch) for e in evals)
    needed = memory(size, spec.optim.micro_tokens, spec.adapter.dropout, batch, longest(prepared))
    drawn = eval_seconds(size, pairs, machine, batch) if pairs else 0.0
    calls = evaluated * sum(e.judge_calls for e in evals)
    read = evaluated * sum(e.judge_tokens_in for e in evals)
    written = evaluated * sum(e.judge_tokens_out for e in evals)
    hub = 0.0 if Path(resolve(spec.model)).is_dir() else size.total * PUBLISHED / GIB
    hours = [seconds / 3600 for seconds in (training / machine.flops, asked + sweeps / machine.flops, drawn)]
    adapters = disk / GIB
    return CostEstimate(
        machine=machine.name,
        assumed=machine.assumed,
        training_hours=hours[0],
        answering_hours=hours[1],
        pairs_hours=hours[2],
        memory=needed,
        fits=None if machine.memory is None else RUNTIME + needed.peak <= machine.memory,
        advice=_advice(needed),
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


def _advice(needed: Memory) -> str:
    return "lower optim.micro_tokens" if needed.activations > needed.cache else "lower evals.batch"
