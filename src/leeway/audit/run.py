"""Audit a checkpoint that was trained elsewhere: the evals of a study, its rows and its page, and nothing trained.

Both models answer the same rendered prompts: those of the base's chat template, unless the caller asks otherwise.
Finished evals stay on disk, so that the same command carries on; another model, base or set of items is refused.

Under which chat template the two models of an audit are asked: the same rendered prompt, or a reader is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leeway.audit.models import AuditedModel, GivenBackend, LocalModel, name_of, own_tokenizer, subjects
from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.evals.eval import Eval, Tick
from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request
from leeway.generation.cache import CachedBackend, ReplyCache
from leeway.hashing import digest
from leeway.model.load import load_chat, resolve, resolve_dtype
from leeway.study.build_evals import HelperModels, evals_of
from leeway.study.executors.local import timed
from leeway.study.jobs import BASE
from leeway.study.load import load, parse
from leeway.study.manifest import measured_with
from leeway.study.progress import Reporter, of_answers
from leeway.study.run_dir import RunDir
from leeway.study.runtime import compute_settings
from leeway.study.spec import ALIAS, Spec
from leeway.yaml_config import dump

if TYPE_CHECKING:
    from leeway.report.results import Results


OWN = "own template"  # the condition's name where each model is asked under its own


@dataclass(frozen=True)
class Templates:
    """Under which chat template each model is asked, and what a reader has to be told about it."""

    condition: str
    base: Chat | None = None
    audited: Chat | None = None
    shared_hash: str | None = None  # what stands on both models' rows where no one template does
    note: str = ""


def templates_of(base: AuditedModel, audited: AuditedModel, *, own_template: bool) -> Templates:
    """The base's template for both where their vocabularies agree; else an error, unless each is to have its own."""
    if not isinstance(base, LocalModel) or not isinstance(audited, LocalModel):
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


def _rendered_elsewhere(base: AuditedModel, audited: AuditedModel, *, own_template: bool) -> Templates:
    """Backends render for themselves: theirs is one template where they say the same hash, and unknown of servers."""
    if isinstance(base, GivenBackend) and isinstance(audited, GivenBackend):
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


TRAINING: tuple[str, ...] = (
    "model",
    "revision",
    "objectives",
    "budgets",
    "budget",
    "seeds",
    "optim",
    "adapter",
    "pairs",
    "reference",
)
TRAINING += ("auxiliary", "name")
EvalsAsked = str | Path | Mapping[str, Any] | None


@dataclass(frozen=True)
class Audit:
    """A checked audit: who is compared, what both are asked, and how it is written down."""

    name: str
    base: AuditedModel
    audited: AuditedModel
    spec: Spec  # its evals, and how they are computed; nothing of it is trained
    tokens: int = 0  # that the checkpoint was trained on; 0: not known
    own_template: bool = False
    notes: tuple[str, ...] = ()

    @property
    def who(self) -> tuple[tuple[str, int, AuditedModel], ...]:
        """(objective, budget, model): the checkpoint first, since it is the one that may not load."""
        return (self.name, self.tokens, self.audited), (BASE, 0, self.base)


@dataclass
class _Measuring:
    """One audit at work: what is measured is on disk, one file per model and eval."""

    audit: Audit
    evals: tuple[Eval, ...]
    templates: Templates
    store: RunDir
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))

    def part(self, objective: str, budget: int, e: Eval) -> Path:
        return self.store.part(objective, 0, budget, e.key, self.templates.condition.replace(" ", "-"))

    def pending(self, objective: str, budget: int) -> list[Eval]:
        return [e for e in self.evals if not self.store.answered(self.part(objective, budget, e))]

    def measure(self) -> None:
        """Ask both models everything that they were not asked yet."""
        tell = timed(self.reporter.heard)
        for objective, budget, _ in self.audit.who:
            for e in self.pending(objective, budget):
                self.reporter.clock.add(e.work, len(e))
        for objective, budget, subject in self.audit.who:
            pending = self.pending(objective, budget)
            if not pending:
                continue
            chat = self.templates.base if objective == BASE else self.templates.audited
            identity = {"objective": objective, "seed": 0, "budget": budget}
            identity["adapter_hash"] = "none" if objective == BASE else subject.identity
            with compute_settings(self.audit.spec), subject.answering(chat, self.audit.spec) as backend:
                asked = alike(backend, self.templates.shared_hash)
                if not isinstance(subject, LocalModel):
                    asked = CachedBackend(asked, ReplyCache(self.store.kept))
                for e in pending:
                    rows = e.run(asked, of_answers(tell, objective, e))
                    self.store.write_part(self.part(objective, budget, e), identity, rows)

    def parts(self) -> dict[Path, str]:
        condition = self.templates.condition
        return {self.part(o, b, e): condition for o, b, _ in self.audit.who for e in self.evals}


def audit(
    model: str | Path | Backend | None = None,
    *,
    base: str | Path | Backend | None = None,
    adapter: str | Path | None = None,
    out: str | Path | None = None,
    evals: EvalsAsked = None,
    overrides: Seq[str] = (),
    name: str | None = None,
    tokens: int = 0,
    own_template: bool = False,
    other_base: bool = False,
    quiet: bool = True,
) -> Results:
    """Measure a checkpoint trained elsewhere against its base, going on where an earlier audit in `out` stopped.

    `model` with `base`: a merged model; `model` (or `base`) with `adapter`: a PEFT folder on it; either may be any
    `Backend`. `evals` is a study file, a preset's name, or what stands under a study's `evals:`; `overrides` are its
    `key=value`. Raises LeewayError.
    """
    from leeway.report.results import Results

    compared = subjects(_plain(model), _plain(base), adapter, other_base=other_base)
    one = checked(*compared, evals, overrides, name=name, tokens=tokens, own_template=own_template)
    folder = Path(out) if out is not None else Path("runs") / f"audit-{one.name}"
    run(one, folder, Reporter(quiet=quiet), f"audit(…, out={str(folder)!r})")
    return Results.load(folder)


def checked(
    base: AuditedModel,
    audited: AuditedModel,
    notes: tuple[str, ...],
    evals: EvalsAsked,
    overrides: Seq[str] = (),
    *,
    name: str | None = None,
    tokens: int = 0,
    own_template: bool = False,
) -> Audit:
    """All settings of an audit, checked; no weights are read."""
    if name is not None and (not ALIAS.fullmatch(name) or name == BASE):
        raise LeewayError(
            f"--name {name!r} cannot be a name on the rows",
            fix="use lower-case letters, digits, . _ - and not 'base'",
        )
    if tokens < 0:
        raise LeewayError(f"--tokens {tokens} is no number of tokens", fix="leave it out where it is not known")
    spec = measured_by(evals, overrides, organism=_is_organism(base))
    return Audit(name or name_of(audited), base, audited, spec, tokens, own_template, notes)


def measured_by(evals: EvalsAsked, overrides: Seq[str] = (), *, organism: bool = False) -> Spec:
    """The study whose evals are asked: a file's or preset's, or one made around a mapping of `evals:`.

    Raises LeewayError where an override would set what only training reads.
    """
    for override in overrides:
        if (key := override.partition("=")[0].split(".")[0]) in TRAINING:
            raise LeewayError(
                f"override {override!r}: {key} has no say where nothing is trained",
                fix="override evals, task, dtype, device or threads",
            )
    if isinstance(evals, Mapping):
        task = {"name": "organism" if organism else "gsm8k"}
        raw = {"name": "evals", "model": "organism", "task": task, "objectives": ["sft"], "budgets": [1]}
        spec = parse(dump({**raw, "evals": dict(evals)}), "evals", tuple(overrides))
    else:
        spec = load(str(evals or ("demo" if organism else "real-data")), tuple(overrides))
    if spec.evals.stop != "never":
        raise LeewayError("evals.stop: an audit asks everything", fix="override it with evals.stop=never")
    return spec


def run(one: Audit, out: Path, reporter: Reporter, command: str) -> Path:
    """Carry an audit out in `out`, going on where an earlier one stopped; returns the report's path."""
    from leeway.report import build

    store, origins = RunDir(out), dict[str, str]()
    reporter.say(f"audit of {one.name}: reading the data")
    evals = tuple(evals_of(one.spec, origins, HelperModels(store.kept, one.spec.device)))
    templates = templates_of(one.base, one.audited, own_template=one.own_template)
    identity = _identity(one, evals, templates)
    _check_same(store, identity)
    failure: LeewayError | None = None
    with store.claimed(digest("audit", identity), _as_yaml(one)):
        measuring = _Measuring(one, evals, templates, store, reporter)
        facts = store.read_manifest() or _manifest(one, measuring, identity, origins, command)
        store.write_manifest(facts)
        try:
            with reporter:
                measuring.measure()
        except LeewayError as error:
            if not any(path.is_file() for path in measuring.parts()):
                raise
            failure = error  # what one model has answered stays, whatever became of the other
        else:
            store.write_ledger([])
            rows = store.write_rows(list(measuring.parts()))
            found = {"conditions": store.conditions(measuring.parts()), "file_hashes": store.file_hashes()}
            store.write_manifest({**facts, **found})
            reporter.say(f"audit of {one.name}: {rows:,} rows; drawing the report")
            return build(out)
    assert failure is not None
    raise failure


def _is_organism(subject: AuditedModel) -> bool:
    """By content: its folder has other names on other machines."""
    local = isinstance(subject, LocalModel) and Path(resolve(subject.model)).is_dir()
    return local and isinstance(subject, LocalModel) and subject.model_hash == LocalModel("organism").model_hash


def _plain(named: str | Path | Backend | None) -> str | Backend | None:
    return str(named) if isinstance(named, Path) else named


def _identity(one: Audit, evals: Seq[Eval], templates: Templates) -> dict[str, str]:
    """All that rows of one audit have in common, by name, so that what differs can be told."""
    spec = one.spec
    where = torch.device("cuda" if torch.cuda.is_available() and spec.device != "cpu" else "cpu")
    template = templates.shared_hash or (templates.base.template_hash if templates.base else "the backends' own")
    return {
        "the base": one.base.identity,
        "the checkpoint": one.audited.identity,
        "its name": one.name,
        "its number of tokens": str(one.tokens),
        "the chat template": template,
        "dtype": str(resolve_dtype(spec.weights, where)).removeprefix("torch."),
        "threads": str(spec.threads),
        "evals.batch": str(spec.evals.batch),
        **{f"evals.{e.key}": e.hash for e in evals},
    }


def _check_same(store: RunDir, identity: dict[str, str]) -> None:
    """Raise where another audit is in the folder, naming what differs."""
    then: dict[str, str] = store.read_manifest().get("audit", {}).get("identity", {})
    for name in {**identity, **then} if then else ():
        if then.get(name) != identity.get(name):
            raise LeewayError(
                f"{store.folder} holds another audit: {name} is {then.get(name)} there, and {identity.get(name)} here",
                fix="give another --out, or repeat the command of that audit",
            )


def _as_yaml(one: Audit) -> str:
    """What was audited and with which evals, as the run directory's study file."""
    told = {"base": one.base.told, "checkpoint": one.audited.told, "own_template": one.own_template}
    how = one.spec.model_dump(mode="json", by_alias=True, include={"evals", "dtype", "device", "threads"})
    plain = {"name": one.name, "audit": told, "tokens": one.tokens or None, **how}
    return dump(plain)


def _manifest(
    one: Audit, measuring: _Measuring, identity: dict[str, str], origins: dict[str, str], command: str
) -> dict[str, Any]:
    """Everything a reader needs to know what was compared, beside the study file."""
    notes = [*one.notes, *([measuring.templates.note] if measuring.templates.note else [])]
    tokens = f"{one.tokens:,} tokens, as its owner says" if one.tokens else "on an unknown number of tokens"
    return {
        **measured_with(measuring.evals, origins),
        "command": command,
        "study_hash": digest("audit", identity),
        "organism": _is_organism(one.base),
        "model": {"name": one.base.told, "hash": one.base.identity, "dtype": identity["dtype"]},
        "audit": {"identity": identity},
        "external": {
            "kind": "audit",
            "count": "tokens" if one.tokens else "unknown",
            "description": [
                ["Base", f"{one.base.told} (hash {one.base.identity})"],
                ["Checkpoint", f"{one.audited.told} (hash {one.audited.identity}), trained elsewhere {tokens}"],
                ["Chat template", measuring.templates.note or "the same for both"],
            ],
            "notes": notes,
        },
    }
