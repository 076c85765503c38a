"""Under which chat template the two models of an audit are asked: the same rendered prompt, or a reader is told."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.evals.eval import Tick
from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request
from leeway.hashing import digest
from leeway.model.load import load_chat
from leeway.study.audit_spec import Given, Subject, Weights, own_tokenizer

OWN = "own template"  # the condition's name where each model is asked under its own


@dataclass(frozen=True)
class Templates:
    """Under which chat template each model is asked, and what a reader has to be told about it."""

    condition: str
    base: Chat | None = None
    audited: Chat | None = None
    shared_hash: str | None = None  # what stands on both models' rows where no one template does
    note: str = ""


def templates_of(base: Subject, audited: Subject, *, own_template: bool) -> Templates:
    """The base's template for both where their vocabularies agree; else an error, unless each is to have its own."""
    if not isinstance(base, Weights) or not isinstance(audited, Weights):
        return _rendered_elsewhere(base, audited, own_template=own_template)
    chat = load_chat(base.model)
    where, tokenizer = own_tokenizer(audited)
    if tokenizer is None:
        return Templates("plain", chat, chat)
    same_words = chat.tokenizer.get_vocab() == tokenizer.get_vocab()
    if same_words and not tokenizer.chat_template:
        return Templates("plain", chat, chat)
    other = Chat(tokenizer)
    if same_words and chat.template_hash == other.template_hash:
        return Templates("plain", chat, chat)
    if own_template:
        shared = digest("own templates", chat.template_hash, other.template_hash, base.identity, audited.identity)
        note = "Each model was asked under its own chat template and tokenizer: a difference is that of both together."
        return Templates(OWN, chat, other, shared, note)
    if not same_words:
        more = len(tokenizer) - len(chat.tokenizer)
        differs = f"{more:+d} tokens" if more else "other tokens"
        raise LeewayError(
            f"{where}: its vocabulary is not that of {base.model} ({differs}), so both cannot read the same prompts",
            fix="give --own-template to ask each under its own, and read a difference as that of both together",
        )
    note = f"{where} brings a chat template of its own; both models were asked under that of {base.model}."
    return Templates("plain", chat, chat, None, note)


def _rendered_elsewhere(base: Subject, audited: Subject, *, own_template: bool) -> Templates:
    """Backends render for themselves: theirs is one template where they say the same hash, and unknown of servers."""
    if isinstance(base, Given) and isinstance(audited, Given):
        if base.backend.template_hash == audited.backend.template_hash:
            return Templates("plain")
        if not own_template:
            raise LeewayError(
                "the two backends have different chat templates "
                f"({base.backend.template_hash}, {audited.backend.template_hash})",
                fix="give both the same, or own_template",
            )
    shared = digest("templates not seen", base.identity, audited.identity)
    note = "A server renders the prompts: whether both models were asked under one chat template cannot be seen here."
    if own_template:
        return Templates(OWN, shared_hash=shared, note="Each model was asked under its own chat template.")
    return Templates("plain", shared_hash=shared, note=note)


@dataclass(frozen=True)
class _Alike:
    """A backend whose rows carry a template hash that both models of an audit share."""

    backend: Backend
    template_hash: str

    @property
    def identity(self) -> str:
        return self.backend.identity

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        return self.backend.complete(requests, tick)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        return self.backend.choose(conversations, options, tick)


def alike(backend: Backend, template_hash: str | None) -> Backend:
    return backend if template_hash is None else _Alike(backend, template_hash)
