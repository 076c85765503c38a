"""Error messages hold text of files and servers: none of it controls a terminal."""

from __future__ import annotations

import pytest

from leeway.errors import LeewayError, printable


@pytest.mark.parametrize(
    "character", ["\x1b", "\x07", "\r", "\x9b", "\x00", "\u202e", "\u200b", "\u2028", "\ufeff", "\ud800"]
)
def test_no_message_controls_a_terminal(character: str) -> None:
    error = LeewayError(f"a{character}b: no such file", fix=f"give {character}")
    assert str(error) == f"a⟨U+{ord(character):04X}⟩b: no such file; give ⟨U+{ord(character):04X}⟩"


def test_plain_text_stays() -> None:
    text = "évals.jailbreak: 日本 — “x”\n  \tsecond line…"
    assert printable(text) == text
