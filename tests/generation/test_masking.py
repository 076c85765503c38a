"""A key is found in what an endpoint sends back, however it is encoded, and no ordinary text is taken for it."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.generation.masking import MASK, mask, quotes, variable_fault

KEY = "sk-Secret/0123+456=789"
KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=60)


@given(key=KEYS, before=st.binary(max_size=9), after=st.binary(max_size=9))
def test_base64_of_a_text_with_the_key_in_it(key: str, before: bytes, after: bytes) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert quotes(encode(before + key.encode() + after).decode(), key)


@pytest.mark.parametrize("shown", [KEY, KEY.upper(), quote(KEY, safe=""), json.dumps(KEY), KEY.encode().hex()])
def test_forms_of_a_key(shown: str) -> None:
    assert quotes(f"rejected {shown}, try another", KEY)
    assert mask(f"rejected {shown}, try another", KEY).replace('"', "") == f"rejected {MASK}, try another"


@pytest.mark.parametrize("key", ["", "none", "EMPTY", "token"])
def test_a_placeholder_is_no_secret(key: str) -> None:
    text = f"there is none: EMPTY {key} token"
    assert mask(text, key) == text
    assert not quotes(text, key)


@pytest.mark.parametrize("name", ["", "OPENAI_API_KEY", "key", "_k2", "MY_PROVIDER_KEY_2026_FOR_TESTS"])
def test_names_of_variables(name: str) -> None:
    assert variable_fault(name) == ""


@pytest.mark.parametrize("name", ["sk-abc", "hf_abcdefghijklmnopqrst12345", "two words", "$KEY", "1key", "key=x"])
def test_a_key_in_place_of_its_variable_is_refused_and_not_quoted(name: str) -> None:
    assert "is not the name of an environment variable" in variable_fault(name)
    assert name not in variable_fault(name)
