"""The `Eval` base class, the `Row` it returns, and the evals of installed packages (entry points `leeway.evals`)."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from leeway.errors import LeewayError
from leeway.generation.backend import PERMANENT, Backend, Conversation, Reply, Request, Tick, is_prefilled
from leeway.generation.thinking import full_text
from leeway.judges import Answer, Judge
from leeway.plugins import NAME, entry_points_of, load_entry_point

NO_ANSWER = "no answer: "
GROUP = "leeway.evals"
PERSONA_AXES = ("persona", "persona-check", "persona-sd3", "persona-self")
AXES = ("capability", "jailbreak", "overrefusal", *PERSONA_AXES, "alignment", "sycophancy")
Work = Literal["generate", "score"]


@dataclass(frozen=True)
class Prompt:
    """The first message that an eval sends for one item, as far as it is known before the run.

    `options` are the answers scored by their next-token probabilities; without them up to `max_new_tokens` tokens are
    generated, `samples` times.
    """

    item: str  # as error messages name it: "item gsm8k/7"
    conversation: Conversation
    max_new_tokens: int = 0
    options: tuple[str, ...] = ()
    temperature: float = 0.0
    samples: int = 1

    @property
    def text(self) -> str:
        return "\n".join(m["content"] for m in self.conversation)

    def requests(self) -> list[Request]:
        """One generation request per sample."""
        return [Request(self.conversation, self.max_new_tokens, self.temperature, k) for k in range(self.samples)]


@dataclass(frozen=True)
class JudgeRef:
    """What scores an eval's answers, as the manifest records it. `hash` covers its prompt or rules."""

    name: str
    hash: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One item's result. Unscored rows carry NaN and a reason: a failure is never a 0 or a 1."""

    eval: str
    attack: str
    item_id: str
    cluster: str
    sample: int
    prompt: str
    response: str
    outcome: str | None
    score: float
    unscored_reason: str | None
    judge: str
    judge_raw: str
    template_hash: str
    new_tokens: int

    def __post_init__(self) -> None:
        if math.isnan(self.score) == (self.unscored_reason is None):
            raise ValueError(f"{self.eval} {self.item_id}: a row needs a score or an unscored_reason, not both")


class Eval(ABC):
    """One axis of measurement: prompts in, scored rows out. Only `name`, `hash`, `run` and `prompts` are required.

    `prompts` is what plans, context checks and timings read. An eval that cannot list its prompts returns none, gives
    its own `__len__`, and is then reported as not planned.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The axis, as in the rows' `eval` column."""

    @property
    def key(self) -> str:
        """File name of the rows; unique in a study."""
        return self.name

    @property
    @abstractmethod
    def hash(self) -> str:
        """Content hash of items, prompts and judge: only rows with equal hashes are pooled."""

    @abstractmethod
    def prompts(self) -> Iterable[Prompt]:
        """Yield the first message of every item."""

    @abstractmethod
    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        """Send every item once and return its rows in item order."""

    def __len__(self) -> int:
        """Number of responses."""
        return sum(p.samples for p in self.prompts())

    def requests(self) -> list[Request]:
        """Return the generation requests of all prompts, one per sample."""
        return [r for p in self.prompts() for r in p.requests()]

    @property
    def work(self) -> Work:
        """What a response costs: "generate" tokens, or "score" options in one forward pass."""
        first = next(iter(self.prompts()), None)
        return "score" if first and first.options else "generate"

    @property
    def needs_model(self) -> bool:
        """Whether `run` needs a `TransformersBackend` itself rather than its (cached) replies."""
        return False

    def judged_by(self) -> Seq[JudgeRef]:
        """Return the judges of the responses; the first one's verdicts make the study's rates."""
        return ()

    def judge_requests(self) -> Iterable[tuple[str, Request]]:
        """Yield (judge name, request with an empty response) for every response that a judge model reads."""
        return ()

    def row(self, item_id: str, prompt: str, reply: Reply, **fields: Any) -> Row:
        """Return the row of a reply; unless `fields` say otherwise, the item is its own cluster and has no outcome.

        The response keeps the thought of a reasoning model; `generation.thinking.final_answer` is what was judged.
        """
        row: dict[str, Any] = {"eval": self.name, "attack": "", "item_id": item_id, "cluster": item_id, "sample": 0}
        row |= {"prompt": prompt, "response": full_text(reply), "new_tokens": reply.new_tokens}
        return Row(**row | {"outcome": None, "unscored_reason": None} | fields)

    def facts(self) -> dict[str, Any]:
        """Return further manifest entries by section, such as `attacks`."""
        return {}

    def clusters(self) -> list[str]:
        """Return each item's cluster, as its rows name it; empty if the eval only runs as a whole."""
        return []

    def part(self, clusters: Collection[str]) -> Eval:  # noqa: ARG002
        """Return the same eval restricted to the items of these clusters."""
        raise LeewayError(f"eval {self.key}: clusters() without part()", fix="implement part()")

    def split(self) -> Mapping[str, ItemEval]:
        """Return one eval per item (and attack) by its id, in row order; empty if the eval only runs as a whole."""
        return {}


class ItemEval(Eval):
    """An eval that is a dataclass with a field `items`, each with an `id`: it runs in parts and item by item."""

    items: Seq[Any]

    def cluster_of(self, item: Any) -> str:
        return str(item.id)

    def clusters(self) -> list[str]:
        return [self.cluster_of(i) for i in self.items]

    def part(self, clusters: Collection[str]) -> Self:
        return self._of([i for i in self.items if self.cluster_of(i) in clusters])

    def split(self) -> dict[str, Self]:
        return {str(i.id): self._of([i]) for i in self.items}

    def unjudged(self) -> Self:
        """Return a copy that leaves responses unscored, for `judge_row` to score later; by default, the eval itself."""
        return self

    def judge_row(self, row: Row) -> Row:
        """Return a row of `unjudged()` with the verdict of the first judge."""
        return row

    def _of(self, items: Seq[Any]) -> Self:
        return replace(self, items=items)  # type: ignore[type-var]


def is_retryable(reason: str | None) -> bool:
    """Return whether a rerun may succeed: true for a failed request, false for failures in PERMANENT."""
    return reason is not None and reason.startswith(NO_ANSWER) and not any(f in reason for f in PERMANENT)


def user_message(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def first_prefilled(evals: Iterable[Eval]) -> Prompt | None:
    """Return the first prompt that ends with the beginning of its answer, which not every backend can continue."""
    return next((p for e in evals for p in e.prompts() if is_prefilled(p.conversation)), None)


def requests_to(judges: Iterable[Judge], prompts: Iterable[str]) -> Iterator[tuple[str, Request]]:
    """Yield (judge name, request) per prompt, with an empty response, for the judges that query a model."""
    prompts = list(prompts)
    for judge in judges:
        if request := getattr(judge, "request", None):
            yield from ((judge.name, request(Answer(p, ""))) for p in prompts)


def load_eval(name: str, settings: Mapping[str, Any] | None = None) -> Eval:
    """Return what an installed package's entry point makes from `settings`. Raises LeewayError if it makes no eval."""
    found = entry_points_of(GROUP, "eval", AXES)
    if name not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise LeewayError(f"evals.plugins: no eval {name!r}", fix=f"one of: {known}")
    make = load_entry_point(found[name], "eval")
    try:
        made = make(**(settings or {}))
    except (TypeError, ValueError) as error:
        raise LeewayError(f"evals.plugins: {name}: {error}", fix="see that package for its settings") from error
    if not isinstance(made, Eval):
        why = f"makes a {type(made).__name__}, not a leeway.evals.eval.Eval"
    elif made.name != name or not re.fullmatch(NAME, made.key):
        why = f"makes an eval named {made.name!r} with key {made.key!r}"
    else:
        return made
    fix = "return a subclass of Eval with the entry point's name and a key in lower case"
    raise LeewayError(f"evals.plugins: {name}: {found[name].value} {why}", fix=fix)
