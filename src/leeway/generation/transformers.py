"""Backends that run a model in this process: the model under test, and a model by name, loaded on first use.

Requests run in batches of similar length. A row with non-finite logits becomes a failure; the rest of its batch
continues. On a CPU the fused decoder generates, elsewhere `generate` of the transformers library.

Ancestral sampling draws each token from softmax(logits / T), without top-k or top-p. Each request has its own random
stream, seeded by (prompt ids, temperature, sample, seed), and consumes one uniform number per token, so the rest of a
batch changes a reply only through the rounding of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.generation.backend import NOT_FINITE, Choice, Conversation, Reply, Request, Tick, context_fault, spellings
from leeway.generation.thinking import without_thinking
from leeway.hashing import derive_seed, digest
from leeway.model import adapters
from leeway.model.fused.decoder import why_not
from leeway.model.fused.generate import Decoding
from leeway.model.load import Dtype, Model, load_chat, load_model, resolve_device, resolve_dtype, weights_hash

BLOCK = 512  # tokens summed on the device before the cumulative sum on the CPU


def stream(prompt: Seq[int], temperature: float, sample: int, seed: int) -> np.random.Generator:
    """Return the random stream of one request."""
    return np.random.default_rng(derive_seed("answer", list(prompt), float(temperature), sample, seed))


def draw(logits_BV: Tensor, temperature: float, u_B: Tensor) -> Tensor:
    """Return the token at the u-quantile of softmax(logits / T) for each row, [B]; never one of probability 0.

    A cumulative sum over the vocabulary is not deterministic on a GPU, so sum blocks there and search on the CPU.
    """
    p_BV = (logits_BV.double() / temperature).softmax(-1)
    blocks_BKN = torch.nn.functional.pad(p_BV, (0, -p_BV.shape[1] % BLOCK)).view(len(p_BV), -1, BLOCK)
    sums_BK = blocks_BKN.sum(-1).cpu()
    block_B, rest_B = _quantile(sums_BK, u_B * sums_BK.sum(-1))
    rows = torch.arange(len(block_B))
    block_BN = blocks_BKN[rows.to(p_BV.device), block_B.to(p_BV.device)].cpu()
    within_B, _ = _quantile(block_BN, rest_B)
    token_B = (block_B * BLOCK + within_B).clamp(max=logits_BV.shape[1] - 1)  # in range even if all is NaN
    return token_B.to(logits_BV.device)


def _quantile(mass_BN: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the first index whose cumulative sum exceeds the target, the remainder of the target within it)."""
    cumulative_BN = mass_BN.cumsum(-1)
    below_B = torch.minimum(target_B, torch.nextafter(cumulative_BN[:, -1], torch.zeros_like(target_B)))
    index_B = torch.searchsorted(cumulative_BN, below_B[:, None], right=True)[:, 0].clamp(max=mass_BN.shape[1] - 1)
    before_B = cumulative_BN.gather(1, index_B[:, None])[:, 0] - mass_BN.gather(1, index_B[:, None])[:, 0]
    return index_B, (below_B - before_B).clamp(min=0.0)


class NonFiniteGuard:
    """A logits processor that records each row's first step with NaN, +inf or only -inf, and forces `stop` there."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self._bad: list[Tensor] = []  # one [B] per step, on the model's device

    def __call__(self, ids_BL: Tensor, scores_BV: Tensor) -> Tensor:  # noqa: ARG002 - the library's protocol
        bad_B = ~scores_BV.amax(-1).isfinite()  # amax propagates NaN
        self._bad.append(bad_B)
        stop_V = torch.full_like(scores_BV[0], -torch.inf)
        stop_V[self.stop] = 0.0
        return torch.where(bad_B[:, None], stop_V, scores_BV)

    def first_bad_steps(self) -> list[int | None]:
        """Return each row's first step without finite scores, or None."""
        bad_BS = torch.stack(self._bad, dim=1).tolist()
        return [row.index(True) if True in row else None for row in bad_BS]


@dataclass(frozen=True)
class AncestralSampler:
    """A logits processor that leaves only the sampled token; row b samples from `streams[b]`."""

    temperature: float
    streams: Seq[np.random.Generator]

    def tokens(self, scores_BV: Tensor, rows: Seq[int]) -> Tensor:
        """Sample one token per row, row b from stream rows[b]."""
        u_B = torch.tensor([self.streams[r].random() for r in rows], dtype=torch.float64)
        return draw(scores_BV, self.temperature, u_B)

    def __call__(self, ids_BL: Tensor, scores_BV: Tensor) -> Tensor:  # noqa: ARG002 - the library's protocol
        token_B = self.tokens(scores_BV, range(len(scores_BV)))
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, token_B[:, None], 0.0)


SHRINK_AT = 0.75  # drop finished rows from a batch once at most this share is unfinished

StoppingCriterion = Callable[..., Tensor]  # of the transformers library: (ids_BL, scores) -> finished rows, [B]


@dataclass
class TransformersBackend:
    """Generate with `model` in its current state (adapter merged or not); batches depend on the requests only.

    `overlong`: whether a prompt without room for its reply raises, or fails that request alone. Use "failure" where a
    conversation grows turn by turn, or for a judge's prompt that contains a reply. `thinking`: replies begin with a
    thought; options are chosen without one.
    """

    model: Model
    prefix: str = ""
    batch: int = 128
    overlong: Literal["error", "failure"] = "error"
    thinking: bool = False

    @property
    def chat(self) -> Chat:
        chat = self.model.chat.with_prefix(self.prefix)
        return chat.with_thinking() if self.thinking else chat

    @property
    def identity(self) -> str:
        """Hash of the base model and the current adapter."""
        attached = adapters.adapter_hash(adapters.state(self.model)) if adapters.trainable(self.model) else ""
        return digest("transformers", self.model.hash, attached)

    @property
    def template_hash(self) -> str:
        return self.chat.template_hash

    @property
    def fused(self) -> bool:
        """Whether the fused decoder generates: on a CPU, if it supports model and adapter."""
        dora = {getattr(c, "use_dora", False) for c in getattr(self.model.lm, "peft_config", {}).values()}
        return self.model.device.type == "cpu" and not any(dora) and not why_not(self.model.lm)

    @torch.no_grad()
    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """Return greedy or sampled replies. Raises LeewayError if a prompt and its reply exceed the context."""
        chat = self.chat
        prompts = [chat.prompt_ids(r.conversation) for r in requests]
        replies: list[Reply | None] = [None] * len(requests)
        fitting = []
        for i, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
            fault = context_fault(len(ids), request.max_new_tokens, self.model.context)
            if fault is None:
                fitting.append(i)
                continue
            if self.overlong == "error":
                fix = "lower max_new_tokens, or leave the item out"
                raise LeewayError(f"model {self.model.name}: {fault}", fix=fix)
            replies[i] = Reply("", 0, False, fault)
            tick(1)
        keys = [(requests[i].max_new_tokens, requests[i].temperature, len(prompts[i])) for i in fitting]
        for members in self._batches(keys):
            batch = [fitting[k] for k in members]
            limit = requests[batch[0]].max_new_tokens
            sampler = None
            if temperature := requests[batch[0]].temperature:
                streams = [stream(prompts[i], temperature, requests[i].sample, requests[i].seed) for i in batch]
                sampler = AncestralSampler(temperature, streams)
            outputs = self._generate_ids([prompts[i] for i in batch], limit, sampler)
            for i, (new, bad_step) in zip(batch, outputs, strict=True):
                reply = self._reply(new, limit, bad_step)
                replies[i] = without_thinking(reply, opened=chat.opens_thought(requests[i].conversation))
            tick(len(batch))
        return [r for r in replies if r is not None]

    @torch.no_grad()
    def greedy(
        self, prompts: Seq[tuple[int, ...]], limit: int, stopping: Seq[StoppingCriterion] = ()
    ) -> list[tuple[list[int], str | None]]:
        """Return (ids before the stop token, failure or None) per prompt, generated as one batch."""
        return [self._before_stop(ids, bad) for ids, bad in self._generate_ids(prompts, limit, None, stopping)]

    @torch.no_grad()
    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """Return next-token probabilities, summed over the tokens that spell an option.

        Raises LeewayError if no token spells an option: its first token may begin other words.
        """
        chat = self.chat.without_thinking()
        tokens = option_ids(chat, options)
        prompts = [chat.prompt_ids(c) for c in conversations]
        choices: list[Choice | None] = [None] * len(prompts)
        for batch in self._batches([(len(p),) for p in prompts]):
            p_BV = self._next_logits([prompts[i] for i in batch]).float().softmax(-1)
            finite_B = p_BV.isfinite().all(-1).tolist()  # one NaN or +inf among the logits makes all of them NaN
            for row, i in enumerate(batch):
                mass = {o: float(p_BV[row, sorted(ids)].sum()) for o, ids in tokens.items()}
                choices[i] = Choice(mass, None if finite_B[row] else NOT_FINITE)
            tick(len(batch))
        return [c for c in choices if c is not None]

    def _batches(self, keys: Seq[tuple[float, ...]]) -> Iterator[list[int]]:
        """Yield batches of indices sorted by key; the last element, the length, may differ within a batch."""
        order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
        start = 0
        while start < len(order):
            shared = keys[order[start]][:-1]
            batch = [i for i in order[start : start + self.batch] if keys[i][:-1] == shared]
            yield batch
            start += len(batch)

    def _left_padded(self, prompts: Seq[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        length = max(map(len, prompts))
        ids = [[0] * (length - len(p)) + list(p) for p in prompts]
        mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _next_logits(self, prompts: Seq[tuple[int, ...]]) -> Tensor:
        """Return next-token logits, [B, V]; -inf for control tokens."""
        if self.fused:
            return self.model.head.logits(Decoding(self.model.lm, prompts, self.model.device).begin())
        ids_BL, mask_BL = self._left_padded(prompts)
        logits_BV: Tensor = self.model.lm(input_ids=ids_BL, attention_mask=mask_BL, logits_to_keep=1).logits[:, -1]
        logits_BV[:, list(self.model.head.blocked)] = -torch.inf
        return logits_BV

    def _generate_ids(
        self,
        prompts: Seq[tuple[int, ...]],
        limit: int,
        sampler: AncestralSampler | None,
        stopping: Seq[StoppingCriterion] = (),
    ) -> list[tuple[list[int], int | None]]:
        """Return (at most `limit` new ids, the first step with non-finite scores) per prompt."""
        stop = self._stop_ids()
        if self.fused and not stopping:
            return decode(self.model, prompts, limit, set(stop), sampler)
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        guard = NonFiniteGuard(stop[0])
        ids_BL, mask_BL = self._left_padded(prompts)
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,  # the sampler leaves one finite score
            eos_token_id=stop,
            pad_token_id=stop[0],
            suppress_tokens=list(self.model.head.blocked) or None,
        )
        out: Tensor = self.model.lm.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            generation_config=config,
            logits_processor=LogitsProcessorList([p for p in (guard, sampler) if p]),
            stopping_criteria=StoppingCriteriaList(stopping),
        )
        return list(zip(out[:, ids_BL.shape[1] :].tolist(), guard.first_bad_steps(), strict=True))

    def _stop_ids(self) -> list[int]:
        return stop_ids(self.chat, self.model.stop_ids)

    def _reply(self, ids: list[int], limit: int, bad_step: int | None) -> Reply:
        """Decode one row; a failure if its scores were non-finite before its end."""
        text_ids, failure = self._before_stop(ids, bad_step)
        if failure:
            return Reply("", bad_step or 0, False, failure)
        return Reply(self.chat.decode(text_ids).strip(), len(text_ids), len(text_ids) == len(ids) >= limit)

    def _before_stop(self, ids: list[int], bad_step: int | None) -> tuple[list[int], str | None]:
        stop = set(self._stop_ids())
        end = next((k for k, i in enumerate(ids) if i in stop), len(ids))
        return ids[:end], NOT_FINITE if bad_step is not None and bad_step <= end else None


def option_ids(chat: Chat, options: Seq[str]) -> dict[str, list[int]]:
    """Return the ids of the single tokens that spell each option. Raises LeewayError if an option has none."""
    vocabulary = chat.tokenizer.get_vocab()
    tokens = {o: sorted(vocabulary[s] for s in spellings(o) if s in vocabulary) for o in options}
    if missing := [o for o in options if not tokens[o]]:
        what = f"model {chat.tokenizer.name_or_path}: {missing[0]!r} is not a single token of its tokenizer"
        raise LeewayError(what, fix="leave out the evals that choose between options (persona, sd3)")
    return tokens


def stop_ids(chat: Chat, own: Collection[int]) -> list[int]:
    """Return the template's end of turn (if an added token), the tokenizer's EOS, and the model's `own` stop ids."""
    added = chat.tokenizer.added_tokens_decoder
    return sorted({*[i for i in chat.closing_ids if i in added][:1], *chat.stop_ids, *own})


def decode(
    model: Model, prompts: Seq[tuple[int, ...]], limit: int, stop: Collection[int], sampler: AncestralSampler | None
) -> list[tuple[list[int], int | None]]:
    """Generate with the fused decoder; finished rows leave the batch.

    Return per prompt (at most `limit` new ids, a stop token included; the first step with non-finite scores, which
    ends its row).
    """
    new_ids: list[list[int]] = [[] for _ in prompts]
    bad_steps: list[int | None] = [None] * len(prompts)
    rows, active = list(range(len(prompts))), set(range(len(prompts)))  # rows of the batch; unfinished prompts
    decoding = Decoding(model.lm, prompts, model.device)
    hidden_BD = decoding.begin()
    for step in range(limit):
        if sampler is None:
            token_B, largest_B = model.head.greedy(hidden_BD)
        else:
            scores_BV = model.head.logits(hidden_BD)
            token_B, largest_B = sampler.tokens(scores_BV, rows), scores_BV.amax(-1)  # amax propagates NaN
        bad_B = (~largest_B.isfinite()).tolist()
        for row, token, bad in zip(rows, token_B.tolist(), bad_B, strict=True):
            if row in active and bad:
                bad_steps[row] = step
            elif row in active:
                new_ids[row].append(token)
            if bad or token in stop:
                active.discard(row)
        if not active or step + 1 == limit:
            break
        if len(active) <= SHRINK_AT * len(rows):
            places = [k for k, row in enumerate(rows) if row in active]
            decoding.keep(places)
            rows, token_B = [rows[k] for k in places], token_B[places]
        hidden_BD = decoding.step(token_B)
    return list(zip(new_ids, bad_steps, strict=True))


@dataclass
class LocalBackend:
    """A model by hub id or folder (a judge, attacker or translator); the first request loads its weights."""

    name: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    batch: int = 32

    @cached_property
    def identity(self) -> str:
        """Hash of the weights and the dtype they run in; reads a folder's files once."""
        dtype = resolve_dtype(self.dtype, resolve_device(self.device))
        return digest("local", weights_hash(self.name, self.revision), str(dtype))

    @property
    def template_hash(self) -> str:
        return self._chat.template_hash

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        return self._backend.complete(requests, tick) if requests else []

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        return self._backend.choose(conversations, options, tick) if conversations else []

    @cached_property
    def _chat(self) -> Chat:
        return load_chat(self.name, self.revision)

    @cached_property
    def _backend(self) -> TransformersBackend:
        model = load_model(self.name, revision=self.revision, dtype=self.dtype, device=self.device)
        return TransformersBackend(model, "", self.batch, overlong="failure")
