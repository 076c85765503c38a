"""Sequential stopping: the measures that decide, the looks, and when a checkpoint is decided."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from leeway.stats.anytime import DESIGN, FIXED, SEQUENTIAL, Anytime, is_sequential
from leeway.stats.metrics import BASE, analysis_table, measures
from leeway.stats.pairing import paired_contrasts

LEVEL = 0.05  # of a family, as in the tables
MARGIN = 0.05  # as on the report page
FIRST, GROWTH = 40, 1.5  # prompts at the first look, and the factor from one look to the next

GROUP = ["objective", "seed", "budget", "condition", "eval"]
COUNTS = ["prompts", "of_prompts", "answers", "of_answers", "new_tokens", "tokens_saved"]


def looks(clusters: int) -> Iterator[int]:
    """Yield the number of clusters seen at each look, up to all of them."""
    seen = float(FIRST)
    while seen < clusters:
        yield round(seen)
        seen *= GROWTH
    if clusters:
        yield clusters


@dataclass(frozen=True)
class StoppingRule:
    """When a checkpoint has answered enough prompts of an axis; `objectives` is the study's number at each budget."""

    objectives: int
    margin: float = MARGIN
    level: float = LEVEL

    def undecided(self, base: pd.DataFrame, own: pd.DataFrame, axis: str) -> list[str]:
        """Return the stopping measures not yet shown to differ from the base, nor to differ by less than the margin.

        `base`: all rows of the base on the axis under one test prompt; `own`: the checkpoint's rows so far. The level
        is divided in advance (Bonferroni over the family), so that no checkpoint depends on another. Stopping measures
        are those over all parts and attacks, such as `asr` and `refusal`; not `asr:dan` or `endorsement:narcissism`,
        which use whatever prompts were answered.
        """
        conditions = dict.fromkeys({*base["template_hash"], *own["template_hash"]}, "tested")
        known = [m for m in measures(analysis_table(base, conditions)) if m.axis == axis and not m.log_odds]
        left = [m.name for m in known if m.primary or ":" not in m.name]
        rows = pd.concat([base, own.assign(**{DESIGN: SEQUENTIAL})], ignore_index=True)
        contrasts, _ = paired_contrasts(rows, conditions, only=left)
        for contrast in (c for c in contrasts if c.scored is not None):
            family = self.objectives * sum(m.primary == contrast.measure.primary for m in known)
            if Anytime(contrast.cluster_differences).decision(self.level / family, self.margin):
                left = [name for name in left if name != contrast.measure.name]
        return left


def with_design(rows: pd.DataFrame, axes: Collection[str]) -> pd.DataFrame:
    """Add the column `design` to the rows; the base always answers every prompt."""
    mark = rows["eval"].isin(list(axes)) & (rows["objective"] != BASE)
    return rows.assign(**{DESIGN: mark.map({True: SEQUENTIAL, False: FIXED})})


def sample_sizes(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Return one line per checkpoint, test prompt and sequential axis: prompts and responses, of those of the base.

    `tokens_saved` assumes that responses not generated would have been as long as the others.
    """
    rows = rows.assign(condition=rows["template_hash"].map(dict(conditions)).fillna("plain"))
    of_base = rows[rows["objective"] == BASE]
    lines = []
    for key, own in rows[is_sequential(rows)].groupby(GROUP, sort=True):
        every = of_base[(of_base["eval"] == key[-1]) & (of_base["condition"] == key[-2])]
        answers, total = len(_responses(own)), len(_responses(every))
        tokens = int(_responses(own)["new_tokens"].sum())
        line = dict(zip(GROUP, key, strict=True)) | {"prompts": own["cluster"].nunique()}
        line |= {"of_prompts": every["cluster"].nunique(), "answers": answers, "of_answers": total}
        lines.append(line | {"new_tokens": tokens, "tokens_saved": round(tokens / answers * max(total - answers, 0))})
    return pd.DataFrame(lines, columns=[*GROUP, *COUNTS])


def _responses(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per response, however many judges scored it."""
    return rows.drop_duplicates(["attack", "item_id", "sample", "prompt"])
