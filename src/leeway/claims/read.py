"""Claims from a list, a file or a set that ships with Leeway; every fault of every claim at once."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from leeway.claims.kinds import KINDS, Claim, Claims, hash_of
from leeway.errors import LeewayError
from leeway.faults import faults
from leeway.loader import read
from leeway.part import nearest
from leeway.paths import expand

BUNDLED: dict[str, str] = {"objective-matters": "what arXiv 2601.12639 reports, in our words and with our margins"}
SET = ("name", "version", "if_absent", "claims")
KNOWN = f" (known here: {', '.join(SET)})"


def build(raw: Any) -> Claims:
    """A list of claims, or a mapping with `claims`; raises ValueError, one fault a line.

    `if_absent` beside the list holds for every claim that does not say otherwise.
    """
    if isinstance(raw, Claims):
        return raw
    whole = raw if isinstance(raw, dict) else {"claims": raw}
    said = [f"unknown key {k!r}{nearest(str(k), SET) or KNOWN}" for k in whole if k not in SET]
    listed = whole.get("claims")
    if not isinstance(listed, list) or not listed:
        raise ValueError("\n".join([*said, "give a list of claims, a file's path, or a set's name"]))
    default = {"if_absent": whole["if_absent"]} if "if_absent" in whole else {}
    found: list[Claim] = []
    for place, one in enumerate(listed, start=1):
        claim, wrong = _claim(one, default, place)
        found += [claim] if claim else []
        said += wrong
    names = [c.id for c in found]
    said += [f"{n} is the id of two claims" for n in sorted({n for n in names if names.count(n) > 1})]
    head = {k: v for k, v in whole.items() if k in ("name", "version")}
    try:
        if not said:
            return Claims.model_validate({**head, "claims": found})
    except ValidationError as error:
        said += faults(error, Claims)
    raise ValueError("\n".join(said))


def _claim(raw: Any, default: dict[str, Any], place: int) -> tuple[Claim | None, list[str]]:
    if not isinstance(raw, dict):
        return None, [f"claim {place} is {raw!r}, not a mapping with id, says and kind"]
    called = str(raw.get("id", f"claim {place}"))
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        what = "kind is missing" if kind is None else f"no kind {kind!r}{nearest(str(kind), KINDS)}"
        return None, [f"{called}: {what} (there are: {', '.join(KINDS)})"]
    try:
        return KINDS[kind].model_validate({**default, **raw}), []
    except ValidationError as error:
        return None, [f"{called}: {line}" for line in faults(error, KINDS[kind])]


def parse(text: str, where: str) -> Claims:
    """Claims from YAML; all faults in one LeewayError."""
    try:
        return build(read(text, where))
    except ValueError as error:
        raise LeewayError(f"{where}: " + "; ".join(str(error).split("\n")), fix="docs/claims.md shows how") from error


def load(name: str, folder: Path | None = None) -> Claims:
    """A set by its name, or a file, its path taken from `folder`."""
    return parse(*text_of(name, folder))


def text_of(name: str, folder: Path | None = None) -> tuple[str, str]:
    """(what a set or a file holds, where it is)."""
    if name in BUNDLED:
        return (files("leeway.claims") / f"{name}.yaml").read_text("utf-8"), f"claims {name}"
    path = (folder or Path()) / expand(name)
    if not path.is_file():
        fix = f"give a file, or one of: {', '.join(BUNDLED)}"
        raise LeewayError(f"claims: {name}: neither a file ({path}) nor a set{nearest(name, BUNDLED)}", fix=fix)
    try:
        return path.read_text("utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error


def stored(claims: Claims) -> dict[str, Any]:
    """As a manifest keeps them: what was claimed before anything was trained."""
    plain = claims.to_plain()
    return {"hash": claims.hash, "name": claims.name, "version": claims.version, "list": plain["claims"]}


def restored(kept: dict[str, Any]) -> Claims:
    """What a manifest keeps; raises ValueError where it is not what its hash was taken of."""
    plain = {"name": kept.get("name"), "version": kept.get("version"), "claims": kept.get("list")}
    if kept.get("hash") != hash_of(plain):
        raise ValueError("they are not what their hash was taken of")
    return build(plain)
