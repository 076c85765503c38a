"""The transformers backend: batches by length, greedy or drawn answers, one forward pass for choices.

Where the model's numbers are infinite or none, there is no answer but a failure, and the rest of its batch goes on.

Answers by the fused decoder: rows that have ended leave the batch, and it ends with its last one.

A model of one's own beside the one under test: a judge, an attacker, a translator. Loaded when it is first asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.generation.backend import NOT_FINITE, OVERLONG, Choice, Conversation, Reply, Request, Tick
from leeway.generation.sampling import Ancestral, Finite, stream
from leeway.hashing import digest
from leeway.model import adapters
from leeway.model.fused.decoder import why_not
from leeway.model.fused.generate import Decoding
from leeway.model.load import Dtype, Model, load_chat, load_model, model_hash, resolve, resolve_dtype

CROWDED = 0.75  # a batch is made smaller once no more of its rows than this are still at it


def decode(
    model: Model, prompts: Seq[tuple[int, ...]], limit: int, stop: Collection[int], drawing: Ancestral | None
) -> list[tuple[list[int], int | None]]:
    """Per prompt, at most `limit` new ids, a stop token among them, and the first step without finite scores.

    Greedy, or drawn by `drawing`, whose streams are the prompts'. A row without finite scores ends there.
    """
    said: list[list[int]] = [[] for _ in prompts]
    until: list[int | None] = [None] * len(prompts)
    rows, going = list(range(len(prompts))), set(range(len(prompts)))  # whose states these are; who is still at it
    decoding = Decoding(model.lm, prompts, model.device)
    hidden_BD = decoding.begin()
    for step in range(limit):
        scores_BV = model.head.logits(hidden_BD)
        lost = (~scores_BV.amax(-1).isfinite()).tolist()  # a NaN anywhere is the maximum
        token_B = scores_BV.argmax(-1) if drawing is None else drawing.tokens(scores_BV, rows)
        for row, token, bad in zip(rows, token_B.tolist(), lost, strict=True):
            if row in going and bad:
                until[row] = step
            elif row in going:
                said[row].append(token)
            if bad or token in stop:
                going.discard(row)
        if not going or step + 1 == limit:
            break
        if len(going) <= CROWDED * len(rows):
            kept = [k for k, row in enumerate(rows) if row in going]
            decoding.keep(kept)
            rows, token_B = [rows[k] for k in kept], token_B[kept]
        hidden_BD = decoding.step(token_B)
    return list(zip(said, until, strict=True))


Stopping = Callable[..., Tensor]  # as the library calls its criteria: (ids_BL, scores) -> which rows have ended, [B]


@dataclass
class TransformersBackend:
    """Answers with `model` as it stands (adapter merged or not); batches depend on the requests alone.

    A prompt that leaves no room for its answer is an error, or that request's failure where `overlong` says so:
    a conversation may outgrow the context turn by turn, and a judge's prompt with the answer in it.
    """

    model: Model
    prefix: str = ""
    batch: int = 128
    overlong: Literal["error", "failure"] = "error"

    @property
    def chat(self) -> Chat:
        return self.model.chat.with_prefix(self.prefix)

    @property
    def identity(self) -> str:
        """The base model's hash and the adapter's as it stands."""
        attached = adapters.adapter_hash(adapters.state(self.model)) if adapters.trainable(self.model) else ""
        return digest("transformers", self.model.hash, attached)

    @property
    def template_hash(self) -> str:
        return self.chat.template_hash

    @torch.no_grad()
    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """Greedy or drawn replies; raises LeewayError where a prompt and its answer would not fit into the context."""
        prompts = [self.chat.prompt_ids(r.conversation) for r in requests]
        replies: list[Reply | None] = [None] * len(requests)
        fits = []
        for i, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
            fault = self._lacks_room(len(ids), request.max_new_tokens)
            if fault and self.overlong == "error":
                raise LeewayError(
                    f"model {self.model.name}: {fault}", fix="lower max_new_tokens, or leave the item out"
                )
            if fault:
                replies[i] = Reply("", 0, False, fault)
                tick(1)
            else:
                fits.append(i)
        keys = [(requests[i].max_new_tokens, requests[i].temperature, len(prompts[i])) for i in fits]
        for places in self._batches(keys):
            batch = [fits[k] for k in places]
            limit = requests[batch[0]].max_new_tokens
            said = self._said([prompts[i] for i in batch], limit, _drawing(requests, prompts, batch))
            for i, (new, until) in zip(batch, said, strict=True):
                replies[i] = self._reply(new, limit, until)
            tick(len(batch))
        return [r for r in replies if r is not None]

    @torch.no_grad()
    def greedy(
        self, prompts: Seq[tuple[int, ...]], limit: int, stopping: Seq[Stopping] = ()
    ) -> list[tuple[list[int], str | None]]:
        """Per prompt, in one batch, the ids up to the end of the answer, and why there is none where there is none."""
        return [self._kept(ids, until) for ids, until in self._said(prompts, limit, None, stopping)]

    @torch.no_grad()
    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """One forward pass per batch; an option's spellings are itself, capitalised or not, with or without a space."""
        spellings = {o: self._first_tokens(o) for o in options}
        if any(spellings[a] & spellings[b] for a in options for b in options if a != b):
            raise LeewayError(
                f"model {self.model.name}: {' and '.join(options)} begin with the same token",
                fix="its tokenizer cannot tell them apart by their first token: leave out what asks it Yes or No",
            )
        prompts = [self.chat.prompt_ids(c) for c in conversations]
        choices: list[Choice | None] = [None] * len(prompts)
        for batch in self._batches([(len(p),) for p in prompts]):
            p_BV = self._next_logits([prompts[i] for i in batch]).float().softmax(-1)
            finite_B = p_BV.isfinite().all(-1).tolist()  # one NaN or +inf among the logits makes all of them NaN
            for row, i in enumerate(batch):
                mass = {o: float(p_BV[row, sorted(ids)].sum()) for o, ids in spellings.items()}
                choices[i] = Choice(mass, None if finite_B[row] else NOT_FINITE)
            tick(len(batch))
        return [c for c in choices if c is not None]

    def _first_tokens(self, option: str) -> set[int]:
        forms = {option, option.lower(), option.upper()}
        forms |= {f" {f}" for f in forms}
        return {ids[0] for f in forms if (ids := self._without_lone_space(f))}

    def _without_lone_space(self, text: str) -> tuple[int, ...]:
        """The ids of `text`, without a first token that is nothing but white space (it would fit any answer)."""
        ids = self.chat.ids(text)
        return ids[1:] if ids and not self.chat.tokenizer.decode([ids[0]]).strip() else ids

    def _batches(self, keys: Seq[tuple[float, ...]]) -> Iterator[list[int]]:
        """Indices by key, in batches that share all of it but the length, its last: near lengths waste little."""
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

    @property
    def fused(self) -> bool:
        """Whether the fused decoder answers: on a CPU, where it knows model and adapter."""
        kinds = {getattr(c, "use_dora", False) for c in getattr(self.model.lm, "peft_config", {}).values()}
        return self.model.device.type == "cpu" and not any(kinds) and not why_not(self.model.lm)

    def _next_logits(self, prompts: Seq[tuple[int, ...]]) -> Tensor:
        """What would come next, [B, V]; a control token never does."""
        if self.fused:
            return self.model.head.logits(Decoding(self.model.lm, prompts, self.model.device).begin())
        ids_BL, mask_BL = self._left_padded(prompts)
        logits_BV: Tensor = self.model.lm(input_ids=ids_BL, attention_mask=mask_BL, logits_to_keep=1).logits[:, -1]
        logits_BV[:, list(self.model.head.blocked)] = -torch.inf
        return logits_BV

    def _said(
        self, prompts: Seq[tuple[int, ...]], limit: int, drawing: Ancestral | None, stopping: Seq[Stopping] = ()
    ) -> list[tuple[list[int], int | None]]:
        """Per prompt, at most `limit` new ids and the first step without finite scores."""
        if self.fused and not stopping:
            return decode(self.model, prompts, limit, set(self._stop_ids()), drawing)
        finite = Finite(self._stop_ids()[0])
        new_BL = self._generate(prompts, limit, drawing, finite, stopping)
        return list(zip(new_BL.tolist(), finite.until(), strict=True))

    def _generate(
        self,
        prompts: Seq[tuple[int, ...]],
        limit: int,
        drawing: Ancestral | None,
        finite: Finite,
        stopping: Seq[Stopping],
    ) -> Tensor:
        """By the library: new token ids, [B, at most limit].

        With `drawing` the largest score is the drawn token's; `finite` looks at the scores first.
        """
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        ids_BL, mask_BL = self._left_padded(prompts)
        stop = self._stop_ids()
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop[0],
            suppress_tokens=list(self.model.head.blocked) or None,
        )
        out: Tensor = self.model.lm.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            generation_config=config,
            logits_processor=LogitsProcessorList([p for p in (finite, drawing) if p]),
            stopping_criteria=StoppingCriteriaList(stopping),
        )
        return out[:, ids_BL.shape[1] :]

    def _stop_ids(self) -> list[int]:
        """The template's end of turn, the tokenizer's EOS and what the model's own generation settings name.

        An end of turn counts where the tokenizer holds it for a token of its own, even if not for a special one.
        """
        own = self.chat.tokenizer.added_tokens_decoder
        turn = [i for i in self.chat.closing_ids if i in own][:1]
        return sorted({*turn, *self.chat.stop_ids, *self.model.stop_ids})

    def _reply(self, ids: list[int], limit: int, until: int | None) -> Reply:
        """The answer of one row; a failure where its scores were finite only until a step before its end."""
        kept, failure = self._kept(ids, until)
        if failure:
            return Reply("", until or 0, False, failure)
        return Reply(self.chat.decode(kept).strip(), len(kept), len(kept) == len(ids) >= limit)

    def _kept(self, ids: list[int], until: int | None) -> tuple[list[int], str | None]:
        stop = set(self._stop_ids())
        end = next((k for k, i in enumerate(ids) if i in stop), len(ids))
        return ids[:end], NOT_FINITE if until is not None and until <= end else None

    def _lacks_room(self, prompt: int, new: int) -> str:
        if prompt + new <= self.model.context:
            return ""
        return f"a prompt of {prompt} tokens and {new} new ones {OVERLONG} {self.model.context}"


def _drawing(requests: Seq[Request], prompts: Seq[tuple[int, ...]], batch: Seq[int]) -> Ancestral | None:
    """The streams of a batch in its order; None where it is greedy."""
    temperature = requests[batch[0]].temperature
    if temperature == 0:
        return None
    return Ancestral(
        temperature, [stream(prompts[i], temperature, requests[i].sample, requests[i].seed) for i in batch]
    )


@dataclass
class LocalBackend:
    """A hub id or a model's folder; identity and template are known before any weights are loaded."""

    name: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    prefix: str = ""
    batch: int = 32

    @cached_property
    def identity(self) -> str:
        """The weights by content and the dtype they are run in; a folder's files are read once for it."""
        return digest("local", weights_hash(self.name, self.revision), str(resolve_dtype(self.dtype, self._where())))

    @property
    def template_hash(self) -> str:
        return self._chat.with_prefix(self.prefix).template_hash

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        return self._backend.complete(requests, tick) if requests else []

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        return self._backend.choose(conversations, options, tick) if conversations else []

    def _where(self) -> torch.device:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    @cached_property
    def _chat(self) -> Chat:
        return load_chat(self.name, self.revision)

    @cached_property
    def _backend(self) -> TransformersBackend:
        model = load_model(self.name, revision=self.revision, dtype=self.dtype, device=self.device)
        return TransformersBackend(model, self.prefix, self.batch, overlong="failure")


def weights_hash(name: str, revision: str | None = None) -> str:
    """What `load_model(name).hash` is, without loading the weights: a hub id's config tells its commit."""
    from transformers import AutoConfig

    if Path(resolve(name)).is_dir():
        return model_hash(name, revision, None)
    load_chat(name, revision)  # tells in one line what is wrong with the name
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    return model_hash(name, revision, _Configured(config))


@dataclass(frozen=True)
class _Configured:
    """All that `model_hash` reads of a model."""

    config: object
