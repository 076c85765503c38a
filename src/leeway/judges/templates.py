"""Published judge prompts, read at run time from LEEWAY_DATA, and how texts are put into them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from leeway.errors import LeewayError
from leeway.paths import expand

FILE = "strongreject/judge_templates.json"
TEXTS = ("forbidden_prompt", "response")


def published(names: Seq[str]) -> dict[str, str] | None:
    """These templates of the published file; None where there is none. Raises LeewayError where one is missing.

    Every template but a system prompt has to hold both texts.
    """
    root = os.environ.get("LEEWAY_DATA")
    path = expand(root) / FILE if root else None
    if path is None or not path.is_file():
        return None
    fix = "fetch it again (github: dsbowen/strong_reject), or remove it"
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise LeewayError(f"{path}: not JSON ({error})", fix=fix) from error
    for name in names:
        text = loaded.get(name) if isinstance(loaded, dict) else None
        if not isinstance(text, str) or not (name.endswith("system") or all(f"{{{t}}}" in text for t in TEXTS)):
            raise LeewayError(f"{path}: no {name} with {{forbidden_prompt}} and {{response}} in it", fix=fix)
    return {name: loaded[name] for name in names}


def fill(template: str, texts: Mapping[str, str]) -> str:
    """Put texts in place of `{name}`, in one pass: a placeholder that stands in a text stays as it is."""
    return re.sub("|".join(rf"\{{{re.escape(t)}\}}" for t in texts), lambda m: texts[m[0][1:-1]], template)
