"""A checkpoint as lm-eval's requests want it: log-likelihoods of continuations, and greedy answers to a stop string."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.generation.backend import Conversation
from leeway.generation.transformers import TransformersBackend
from leeway.model.load import decoder


class Answers:
    """Answers lm-eval's requests with the transformers backend; batches depend on the requests alone.

    `failed` holds the contexts to which the model had no answer, with the reason: lm-eval itself is told an empty one.
    """

    def __init__(self, backend: TransformersBackend, in_chat: bool, told: Callable[[int], None]) -> None:
        self.backend, self.in_chat, self.told = backend, in_chat, told
        self.model, self.chat, self.batch = backend.model, backend.chat, backend.batch
        self.rendered: dict[str, tuple[int, ...]] = {}
        self.failed: dict[str, str] = {}

    def render(self, history: Conversation, generate: bool) -> str:
        """The prompt as text, its ids kept; an opening that the task puts into the answer's mouth is joined to it."""
        asked, opening = (history, "") if generate else (history[:-1], history[-1]["content"])
        try:
            ids = self.chat.prompt_ids(asked)
        except Exception as error:
            raise LeewayError(
                f"model {self.model.name}: its chat template cannot render a task's turns ({error})",
                fix="use another task, or chat: false",
            ) from error
        text = self.chat.prompt_text(asked) + opening
        self.rendered[text] = ids + (self.chat.ids(opening) if opening else ())
        return text

    def _context(self, text: str) -> tuple[int, ...]:
        if self.in_chat and text in self.rendered:
            return self.rendered[text]
        return self._plain(text)

    def _plain(self, text: str) -> tuple[int, ...]:
        """Text as it is, with what the tokenizer itself puts before any (a BOS, say), once."""
        bos = self.chat.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return tuple(self.chat.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.in_chat and context in self.rendered:
            return self.rendered[context], self.chat.ids(continuation)
        if not context:
            tokenizer = self.chat.tokenizer
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            ids = self.chat.ids(continuation)
            return ((first,), ids) if ids[0] != first else (ids[:1], ids[1:])
        bare = context.rstrip()
        if not bare:
            return self._plain(context), self.chat.ids(continuation)
        whole = self._plain(bare + context[len(bare) :] + continuation)
        before = self._plain(bare)
        return whole[: len(before)], whole[len(before) :]

    @torch.no_grad()
    def loglikelihood(self, pairs: Seq[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each pair the sum of the continuation's log-probabilities, and whether every token is the likeliest."""
        encoded = [self._pair(*p) for p in pairs]
        for context, continuation in encoded:
            self._check_room(len(context) + len(continuation))
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i][0]) + len(encoded[i][1]), i))
        out: list[tuple[float, bool]] = [(math.nan, False)] * len(encoded)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            hidden_BLD = self._hidden([encoded[i][0] + encoded[i][1] for i in chosen])
            for row, i in enumerate(chosen):
                context, continuation = encoded[i]
                at = slice(len(context) - 1, len(context) + len(continuation) - 1)
                logp_TV = self.model.head.logits(hidden_BLD[row, at]).log_softmax(-1)
                target_T = torch.tensor(continuation, device=logp_TV.device)
                total = logp_TV.gather(1, target_T[:, None]).sum()
                out[i] = (float(total), bool((logp_TV.argmax(-1) == target_T).all()))
            self.told(len(chosen))
        return out

    def _hidden(self, sequences: Seq[tuple[int, ...]]) -> Tensor:
        length = max(map(len, sequences))
        device = self.model.device
        ids_BL = torch.tensor([list(s) + [0] * (length - len(s)) for s in sequences], device=device)
        mask_BL = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences], device=device)
        hidden: Tensor = decoder(self.model.lm)(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return hidden

    @torch.no_grad()
    def generate(self, pairs: Seq[tuple[str, dict[str, Any]]]) -> list[str]:
        """Greedy answers, each cut before the first of its task's stop strings."""
        asked = [(self._context(context), _settings(settings)) for context, settings in pairs]
        for ids, (limit, _) in asked:
            self._check_room(len(ids) + limit)
        order = sorted(range(len(asked)), key=lambda i: (asked[i][1], len(asked[i][0]), i))
        out = [""] * len(asked)
        while order:
            settings = asked[order[0]][1]
            chosen = [i for i in order[: self.batch] if asked[i][1] == settings]
            order = order[len(chosen) :]
            limit, until = settings
            said = _Said(self.chat, max(len(asked[i][0]) for i in chosen), until)
            answers = self.backend.greedy([asked[i][0] for i in chosen], limit, [said] if until else [])
            for i, (new, failure) in zip(chosen, answers, strict=True):
                if failure:
                    self.failed[pairs[i][0]] = failure
                else:
                    out[i] = _before(until, self.chat.decode(new))
            self.told(len(chosen))
        return out

    def _check_room(self, tokens: int) -> None:
        if tokens > self.model.context:
            raise LeewayError(
                f"model {self.model.name}: a request of {tokens} tokens exceeds its context of {self.model.context}",
                fix="ask with fewer shots, or leave the task out",
            )


def _before(until: Seq[str], text: str) -> str:
    return text[: min([at for u in until if (at := text.find(u)) >= 0], default=len(text))]


class _Said:
    """Ends an answer once one of the stop strings stands in it."""

    def __init__(self, chat: Chat, start: int, until: tuple[str, ...]) -> None:
        self.chat, self.start, self.until = chat, start, until
        self.window = max((len(u.encode()) for u in until), default=0) + 4  # a token is at least a byte

    def __call__(self, ids_BL: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 - the library's protocol
        new = ids_BL[:, max(self.start, ids_BL.shape[1] - self.window) :].tolist()
        said = [any(u in self.chat.decode(row) for u in self.until) for row in new]
        return torch.tensor(said, device=ids_BL.device)


def _settings(settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """(most new tokens, stop strings) of a generation request; lm-eval's default is 256 tokens."""
    if settings.get("do_sample") and float(settings.get("temperature", 1.0)) > 0:
        raise LeewayError("evals.capability: an lm-eval task draws its answers", fix="use a task with greedy answers")
    until = settings.get("until") or ()
    limit = settings.get("max_gen_toks") or settings.get("max_new_tokens") or settings.get("max_tokens") or 256
    return int(limit), (until,) if isinstance(until, str) else tuple(u for u in until if u)
