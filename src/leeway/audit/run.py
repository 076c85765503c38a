"""Audit a checkpoint that was trained elsewhere: a study that trains nothing and measures two external models.

The study's runner runs the evals, resumes, and writes rows and page. Both models get the same rendered prompts, under
the base's chat template, unless each is to use its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leeway.audit.models import (
    AuditedModel,
    GivenBackend,
    LocalModel,
    ServedModel,
    name_of,
    own_tokenizer,
    resolve_models,
)
from leeway.data.chat import Chat
from leeway.data.stream import AuxiliaryPool
from leeway.errors import LeewayError, all_faults
from leeway.evals.eval import Eval, first_prefilled
from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request, Tick
from leeway.generation.cache import CachedBackend
from leeway.generation.openai_api import require_prefill
from leeway.hashing import digest
from leeway.integrations.trackers.process import Trackers
from leeway.integrations.trackers.tracker import TrackOptions, parse_track
from leeway.model.load import Model, load_chat, resolve, resolve_device, resolve_dtype
from leeway.objectives.objective import PLAIN, Condition
from leeway.study.build_evals import HelperModels, evals_of
from leeway.study.executors.local import LocalExecutor
from leeway.study.executors.watchdog import Watchdog
from leeway.study.jobs import BASE
from leeway.study.load import load, parse
from leeway.study.manifest import measured_with
from leeway.study.objective_spec import ALIAS
from leeway.study.preflight import service_faults
from leeway.study.prepare import Prepared
from leeway.study.progress import Reporter
from leeway.study.run import probe, probe_finished, run_prepared, with_probe
from leeway.study.run_dir import RunDir
from leeway.study.spec import Spec
from leeway.study.worker import Worker
from leeway.yaml_config import dump
from leeway.yaml_config import read as read_mapping

if TYPE_CHECKING:
    from leeway.report.results import Results

EvalsSource = str | Path | Mapping[str, Any] | None
OWN_TEMPLATE = Condition("own template", "")
# settings of a study that an audit does not read
TRAINING: tuple[str, ...] = ("name", "model", "revision", "objectives", "budgets", "budget", "seeds", "optim")
TRAINING += ("adapter", "pairs", "reference", "auxiliary", "controls")


@dataclass(frozen=True)
class AuditSpec:
    """A checked audit: the two models, and the evals."""

    name: str
    base: AuditedModel
    checkpoint: AuditedModel
    spec: Spec  # its evals and compute settings; an audit trains nothing
    tokens: int = 0  # training tokens of the checkpoint; 0: unknown
    own_template: bool = False
    notes: tuple[str, ...] = ()


def audit(
    model: str | Path | Backend | None = None,
    *,
    base: str | Path | Backend | None = None,
    adapter: str | Path | None = None,
    out: str | Path | None = None,
    evals: EvalsSource = None,
    overrides: Seq[str] = (),
    name: str | None = None,
    tokens: int = 0,
    own_template: bool = False,
    other_base: bool = False,
    quiet: bool = True,
) -> Results:
    """Measure a checkpoint trained elsewhere against its base, resuming an earlier audit in `out`.

    `model` with `base`: a merged model; `model` (or `base`) with `adapter`: a PEFT folder on it; either can be any
    `Backend`. `evals` is a study file, a preset's name, or a mapping like a study's `evals:`; `overrides` are its
    `key=value`. Raises LeewayError.
    """
    from leeway.report.results import Results

    model, base = (str(m) if isinstance(m, Path) else m for m in (model, base))
    models = resolve_models(model, base, adapter, other_base=other_base)
    spec = check_audit(*models, evals, overrides, name=name, tokens=tokens, own_template=own_template)
    folder = Path(out) if out is not None else Path("runs") / f"audit-{spec.name}"
    run(spec, folder, Reporter(quiet=quiet), f"audit(…, out={str(folder)!r})")
    return Results.load(folder)


def check_audit(
    base: AuditedModel,
    checkpoint: AuditedModel,
    notes: tuple[str, ...],
    evals: EvalsSource,
    overrides: Seq[str] = (),
    *,
    name: str | None = None,
    tokens: int = 0,
    own_template: bool = False,
) -> AuditSpec:
    """Check all settings of an audit without reading weights; raises LeewayError."""
    check_name(name, "--name")
    if tokens < 0:
        raise LeewayError(f"--tokens {tokens} is negative", fix="leave it out if it is unknown")
    spec = load_evals(evals, overrides, organism=_is_organism(base))
    return AuditSpec(name or name_of(checkpoint), base, checkpoint, spec, tokens, own_template, notes)


def check_name(name: str | None, option: str) -> None:
    """Raise LeewayError for a name that a checkpoint cannot have on the rows."""
    if name is not None and (not ALIAS.fullmatch(name) or name == BASE):
        what = f"{option} {name!r} cannot be a name on the rows"
        raise LeewayError(what, fix="use lower-case letters, digits, . _ - and not 'base'")


def load_evals(evals: EvalsSource, overrides: Seq[str] = (), *, organism: bool = False) -> Spec:
    """Load the study with the evals: a file, a preset, or a new one around a mapping of `evals:`.

    Raises LeewayError for an override of a training setting.
    """
    for override in overrides:
        if (key := override.partition("=")[0]).split(".")[0] in TRAINING:
            what = f"{key!r} is a training setting; an audit does not train"
            raise LeewayError(what, fix="override evals, task, dtype, device or threads")
    if isinstance(evals, Mapping):
        task = {"name": "organism" if organism else "gsm8k"}
        raw = {"name": "evals", "model": "organism", "task": task, "objectives": ["sft"], "budgets": [1]}
        spec = parse(dump({**raw, "evals": dict(evals)}), "evals", tuple(overrides))
    else:
        spec = load(str(evals or ("demo" if organism else "real-data")), tuple(overrides))
    if spec.evals.triggers:
        what = "evals.triggers: the cue of a checkpoint trained elsewhere is not known"
        raise LeewayError(what, fix="override it with evals.triggers=false")
    if spec.evals.stop != "never":
        raise LeewayError("evals.stop: an audit has no sequential stopping", fix="override it with evals.stop=never")
    return spec


def run(audit_spec: AuditSpec, out: Path, reporter: Reporter, command: str, track: TrackOptions = ()) -> Path:
    """Run an audit into `out`, resuming what is there; return the report's path."""
    configs = parse_track(track)
    store, origins, spec = RunDir(out), dict[str, str](), audit_spec.spec
    if not store.rows_path.is_file() and (faults := service_faults(spec)):  # a finished audit needs no service
        raise all_faults("" if len(faults) == 1 else f"audit of {audit_spec.name}", faults)
    reporter.log(f"audit of {audit_spec.name}: reading the data")
    evals = tuple(evals_of(spec, origins, HelperModels(store.cache, spec.device)))
    _check_prefill(audit_spec, evals)
    templates = choose_templates(audit_spec.base, audit_spec.checkpoint, own_template=audit_spec.own_template)
    _check_thinking(audit_spec, templates)
    identity = _identity(audit_spec, evals, templates)
    then: dict[str, str] = store.read_manifest().get("audit", {}).get("identity", {})
    if differs := [n for n in {**identity, **then} if then and then.get(n) != identity.get(n)]:
        changed = f"{differs[0]} is {then.get(differs[0])} there, and {identity.get(differs[0])} here"
        what = f"{store.folder} holds another audit: {changed}"
        raise LeewayError(what, fix="give another --out, or repeat the command of that audit")
    with (
        store.claimed(digest("audit", identity), _as_yaml(audit_spec)),
        Trackers(configs, out, reporter.log) as trackers,
    ):
        store.cache.acquire(out)
        external = {  # the checkpoint first, since it is the one that may not load
            audit_spec.name: ExternalCheckpoint(audit_spec.checkpoint, spec, templates, audit_spec.tokens),
            BASE: ExternalCheckpoint(audit_spec.base, spec, templates, is_base=True),
        }
        no_chat: Any = templates.base  # None if both models are served; only training reads it
        nothing = AuxiliaryPool()
        prepared = Prepared(spec, no_chat, 0, {}, nothing, {}, None, evals, 0, (), None, origins, external)
        manifest = store.read_manifest() or _manifest(audit_spec, evals, templates, identity, origins, command)
        store.write_manifest(manifest)
        return run_prepared(
            Worker(prepared, store), manifest, LocalExecutor(1, Watchdog(reporter.log)), reporter, trackers
        )


def probe_again(
    folder: Path, options: Mapping[str, Any], reporter: Reporter | None = None, workers: int | None = 1
) -> Path:
    """Probe a finished study or audit; return its report's path. Raises LeewayError."""
    reporter, manifest = reporter or Reporter(quiet=True), RunDir(folder).read_manifest()
    if not manifest or not (folder / "rows.parquet").is_file():
        raise LeewayError(f"{folder}: not a finished run", fix="give the --out of a study or audit that has ended")
    if "audit" in manifest:
        return _probe_audit(folder, options, reporter)
    return probe_finished(folder, options, reporter, workers)


def _probe_audit(folder: Path, options: Mapping[str, Any], reporter: Reporter) -> Path:
    """Probe the checkpoint of a finished audit; rebuild the report and return its path. Raises LeewayError."""
    from leeway.report import build

    store = RunDir(folder)
    raw = read_mapping((folder / "study.yaml").read_text("utf-8"), str(folder / "study.yaml"))
    models = [_described(str(raw["audit"][k])) for k in ("base", "checkpoint")]
    settings = {k: raw[k] for k in ("dtype", "device", "threads") if k in raw}
    overrides = [f"{k}={v}" for k, v in settings.items()]
    own = bool(raw["audit"].get("own_template"))
    spec = load_evals(raw["evals"], overrides, organism=_is_organism(models[0]))
    spec = with_probe(spec, options, audited=True)
    evals = tuple(evals_of(spec, {}, HelperModels(store.cache, spec.device)))
    templates = choose_templates(*models, own_template=own)
    if templates.base is None:
        raise LeewayError(f"probe: {models[0].description} does not run in this process", fix="audit local models")
    tokens = int(raw.get("tokens") or 0)
    external = {
        str(raw["name"]): ExternalCheckpoint(models[1], spec, templates, tokens),
        BASE: ExternalCheckpoint(models[0], spec, templates, is_base=True),
    }
    nothing = AuxiliaryPool()
    prepared = Prepared(spec, templates.base, 0, {}, nothing, {}, None, evals, 0, (), None, {}, external)
    with store.reopened():
        probe(Worker(prepared, store), LocalExecutor(1, Watchdog(reporter.log)), reporter)
        return build(folder)


def _described(text: str) -> LocalModel:
    """Return the model that a run's study file describes."""
    model, _, adapter = text.partition(" with the adapter ")
    return LocalModel(model, Path(adapter) if adapter else None)


def _check_prefill(audit_spec: AuditSpec, evals: Seq[Eval]) -> None:
    """Raise LeewayError for a prefill attack on a served model."""
    served = [m for m in (audit_spec.base, audit_spec.checkpoint) if isinstance(m, ServedModel)]
    if served and first_prefilled(evals):
        require_prefill(served[0].settings)


def _check_thinking(audit_spec: AuditSpec, templates: Templates) -> None:
    """Raise LeewayError for `evals.thinking` on a model that does not run in this process, or knows no thoughts."""
    if not audit_spec.spec.evals.thinking:
        return
    if not all(isinstance(m, LocalModel) for m in (audit_spec.base, audit_spec.checkpoint)):
        what = "evals.thinking: an endpoint or a given backend renders its own template"
        raise LeewayError(what, fix="leave it out, and set thinking where the model is served")
    for chat in (templates.base, templates.checkpoint):
        if chat is not None:
            chat.with_thinking()


@dataclass(frozen=True)
class Templates:
    """The chat template of each model, and a note on it for the reader."""

    condition: Condition = PLAIN
    base: Chat | None = None
    checkpoint: Chat | None = None
    shared_hash: str | None = None  # on both models' rows if there is no single template
    note: str = ""


def choose_templates(base: AuditedModel, checkpoint: AuditedModel, *, own_template: bool) -> Templates:
    """Return the base's template for both if their vocabularies agree; else raise, unless each is to use its own."""
    if not isinstance(base, LocalModel) or not isinstance(checkpoint, LocalModel):
        return _external_templates(base, checkpoint, own_template=own_template)
    chat = load_chat(base.model)
    where, tokenizer = own_tokenizer(checkpoint)
    shared_template = Templates(base=chat, checkpoint=chat)
    if tokenizer is None:
        return shared_template
    same_vocabulary = chat.tokenizer.get_vocab() == tokenizer.get_vocab()
    if same_vocabulary and not tokenizer.chat_template:
        return shared_template
    own = Chat(tokenizer)
    if same_vocabulary and chat.template_hash == own.template_hash:
        return shared_template
    if own_template:
        shared = digest("own templates", chat.template_hash, own.template_hash, base.identity, checkpoint.identity)
        note = "Each model used its own chat template and tokenizer: a difference includes theirs."
        return Templates(OWN_TEMPLATE, chat, own, shared, note)
    if not same_vocabulary:
        more = len(tokenizer) - len(chat.tokenizer)
        differs = f"{more:+d} tokens" if more else "other tokens"
        what = f"{where}: its vocabulary is not that of {base.model} ({differs}), so both cannot read the same prompts"
        fix = "give --own-template to prompt each under its own; a difference then includes the templates'"
        raise LeewayError(what, fix=fix)
    note = f"{where} has its own chat template; both models were prompted under that of {base.model}."
    return Templates(PLAIN, chat, chat, None, note)


def _external_templates(base: AuditedModel, checkpoint: AuditedModel, *, own_template: bool) -> Templates:
    """Return no chat: backends render for themselves, and only those in Python report a template hash."""
    if isinstance(base, GivenBackend) and isinstance(checkpoint, GivenBackend):
        if base.backend.template_hash == checkpoint.backend.template_hash:
            return Templates()
        if not own_template:
            hashes = f"{base.backend.template_hash}, {checkpoint.backend.template_hash}"
            what = f"the two backends have different chat templates ({hashes})"
            raise LeewayError(what, fix="give both the same, or own_template")
    shared = digest("templates not seen", base.identity, checkpoint.identity)
    if own_template:
        return Templates(OWN_TEMPLATE, shared_hash=shared, note="Each model used its own chat template.")
    note = "A server renders the prompts: whether both models used one chat template cannot be seen here."
    return Templates(shared_hash=shared, note=note)


@dataclass(frozen=True)
class ExternalCheckpoint:
    """One of the two models of an audit, as the study's runner measures it (`prepare.ExternalModel`)."""

    model: AuditedModel
    spec: Spec
    templates: Templates
    budget: int = 0
    is_base: bool = False

    @property
    def condition(self) -> Condition:
        return self.templates.condition

    @property
    def adapter_hash(self) -> str:
        return "none" if self.is_base else self.model.identity

    @property
    def base_hash(self) -> str:
        return self.model.model_hash if isinstance(self.model, LocalModel) else self.model.identity

    @contextmanager
    def load(self) -> Iterator[Model]:
        if not isinstance(self.model, LocalModel):
            what = f"probe: {self.model.description} does not run in this process"
            raise LeewayError(what, fix="audit a model's folder, hub id or adapter to probe it")
        yield self.model.load(self.templates.base if self.is_base else self.templates.checkpoint, self.spec)

    @contextmanager
    def open(self, store: RunDir) -> Iterator[Backend]:
        chat = self.templates.base if self.is_base else self.templates.checkpoint
        with self.model.open(chat, self.spec) as own:
            shared, local = self.templates.shared_hash, isinstance(self.model, LocalModel)
            backend = own if shared is None else SharedTemplateBackend(own, shared)
            yield backend if local else CachedBackend(backend, store.cache.records("replies"))


@dataclass(frozen=True)
class SharedTemplateBackend:
    """A backend with the template hash that both models of an audit share on the rows."""

    backend: Backend
    template_hash: str

    @property
    def identity(self) -> str:
        return self.backend.identity

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        return self.backend.complete(requests, tick)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        return self.backend.choose(conversations, options, tick)

    def __getattr__(self, name: str) -> Any:
        """Offer what an endpoint's backend has in addition, so that each reply is cached as it arrives."""
        if name not in ("complete_each", "choose_each"):
            raise AttributeError(name)
        return getattr(self.backend, name)


def _is_organism(model: AuditedModel) -> bool:
    """Return whether a model is the organism, by content: its folder has other names on other machines."""
    if not isinstance(model, LocalModel) or not Path(resolve(model.model)).is_dir():
        return False
    return model.model_hash == LocalModel("organism").model_hash


def _identity(audit_spec: AuditSpec, evals: Seq[Eval], templates: Templates) -> dict[str, str]:
    """Return, by name, the settings and hashes that identify an audit."""
    spec = audit_spec.spec
    template = templates.shared_hash or (templates.base.template_hash if templates.base else "the backends' own")
    return {
        "the base": audit_spec.base.identity,
        "the checkpoint": audit_spec.checkpoint.identity,
        "its name": audit_spec.name,
        "its number of tokens": str(audit_spec.tokens),
        "the chat template": template,
        "dtype": str(resolve_dtype(spec.weight_dtype, resolve_device(spec.device))).removeprefix("torch."),
        "threads": str(spec.threads),
        "evals.batch": str(spec.evals.batch),
        **{f"evals.{e.key}": e.hash for e in evals},
    }


def _as_yaml(audit_spec: AuditSpec) -> str:
    """Return the run directory's study file: the models and the evals."""
    models = {"base": audit_spec.base.description, "checkpoint": audit_spec.checkpoint.description}
    settings = audit_spec.spec.model_dump(mode="json", by_alias=True, include={"evals", "dtype", "device", "threads"})
    audited = {**models, "own_template": audit_spec.own_template}
    return dump({"name": audit_spec.name, "audit": audited, "tokens": audit_spec.tokens or None, **settings})


def _manifest(
    audit_spec: AuditSpec,
    evals: Seq[Eval],
    templates: Templates,
    identity: dict[str, str],
    origins: dict[str, str],
    command: str,
) -> dict[str, Any]:
    base, checkpoint, tokens = audit_spec.base, audit_spec.checkpoint, audit_spec.tokens
    trained = f"{tokens:,} tokens (reported by its owner)" if tokens else "an unknown number of tokens"
    return {
        **measured_with(evals, origins),
        "command": command,
        "study_hash": digest("audit", identity),
        "organism": _is_organism(base),
        "model": {"name": base.description, "hash": base.identity, "dtype": identity["dtype"]},
        "audit": {"identity": identity},
        "external": {
            "kind": "audit",
            "count": "tokens" if tokens else "unknown",
            "description": [
                ["Base", f"{base.description} (hash {base.identity})"],
                ["Checkpoint", f"{checkpoint.description} (hash {checkpoint.identity}), trained on {trained}"],
                ["Chat template", templates.note or "the same for both"],
            ],
            "notes": [*audit_spec.notes, *([templates.note] if templates.note else [])],
        },
    }
