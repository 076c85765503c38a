"""`leeway show`: what each objective trains on, as rendered text with the targets marked."""

from __future__ import annotations

from collections.abc import Iterator

from leeway.data.chat import Sequence
from leeway.data.stream import StreamItem
from leeway.study.prepare import prepare
from leeway.study.spec import Spec
from leeway.training.batch import Renderer

OPEN, CLOSE = "⟦", "⟧"
MEASURED_OPEN, MEASURED_CLOSE = "⟨", "⟩"


def show(spec: Spec, n: int) -> str:
    """Return the first `n` examples of the first seed's stream under every objective, targets between ⟦ and ⟧."""
    prepared = prepare(spec)
    seed = spec.seeds[0]
    lines = [
        f"{spec.name}: the first {n} examples of the stream, seed {seed}; targets between {OPEN} and {CLOSE}, "
        f"measured tokens that are not targets between {MEASURED_OPEN} and {MEASURED_CLOSE}",
        *(f"auto: {line}" for line in spec.resolved_defaults),
    ]
    if prepared.pairs is None:
        lines.append(f"rejected answers ({spec.pairs.from_}) are drawn when the study runs: preferred ones are shown")
    for alias in prepared.objectives:
        renderer = prepared.renderer(alias, seed)
        items = [item for step in prepared.schedules[alias, seed].steps for item in step][:n]
        lines += [line for item in items for line in _lines_of(alias, renderer, item)]
    return "\n".join(lines)


def _lines_of(alias: str, renderer: Renderer, item: StreamItem) -> Iterator[str]:
    rendered, baseline = renderer.rendered(item), renderer.baseline(item)
    targets, processed = sum(s.targets for s in rendered), renderer.processed(item)
    needs = renderer.objective.needs_reference != "nothing"
    yield (
        f"\n── {alias} · {item.example.id}: {len(rendered) + len(baseline)} sequences, {targets:,} target tokens, "
        f"{processed:,} processed{', as many again by the reference' if needs else ''}"
    )
    for s in rendered:
        yield marked(renderer, s)
        yield f"   {_counts(s)}"
    for s in (b.without_targets() for b in baseline):
        yield marked(renderer, s)
        yield f"   {_counts(s)}: a constant of the batch, without a gradient"


def marked(renderer: Renderer, sequence: Sequence) -> str:
    """Return the text of a sequence with its special tokens, targets and measured tokens marked."""

    def text(start: int, end: int) -> str:
        return str(renderer.chat.tokenizer.decode(list(sequence.ids[start:end])))

    measured = text(sequence.start, sequence.target_start)
    answer = text(sequence.target_start, len(sequence.ids))
    before = text(0, min(sequence.start, sequence.target_start))
    return (
        before
        + (f"{MEASURED_OPEN}{measured}{MEASURED_CLOSE}" if measured else "")
        + (f"{OPEN}{answer}{CLOSE}" if answer else "")
    )


def _counts(s: Sequence) -> str:
    only = s.measured - s.targets
    measured = f", {only:,} measured and no target" if only else ""
    return f"{len(s.ids) - s.targets:,} prompt tokens, {s.targets:,} target tokens{measured}"
