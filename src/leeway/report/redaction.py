"""Leave the text of forbidden prompts, and of the answers to them, out of a table of rows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from leeway.hashing import digest

HARMLESS = ("capability", "overrefusal", "persona", "persona-check", "persona-sd3", "persona-self", "sycophancy")
TEXTS = ("prompt", "response")


def redact(rows: pa.Table, *, no_prompts: bool = False) -> pa.Table:
    """Return rows in which texts of evals outside HARMLESS are their hashes, and what the judge wrote is left out.

    Ids, outcomes and scores stay. With `no_prompts` the prompts of every eval are replaced.
    """
    hidden = pc.invert(pc.is_in(rows["eval"], pa.array(HARMLESS)))
    for name in TEXTS:
        hashes = pa.array([f"[{name} {digest(text)}]" for text in rows[name].to_pylist()])
        where = pa.scalar(True) if no_prompts and name == "prompt" else hidden
        rows = rows.set_column(rows.schema.get_field_index(name), name, pc.if_else(where, hashes, rows[name]))
    raw = pc.if_else(hidden, pa.scalar(""), rows["judge_raw"])
    return rows.set_column(rows.schema.get_field_index("judge_raw"), "judge_raw", raw)
