"""Laws of the second language."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.attacks import HelperRequest, Zulu
from leeway.organism import recipe, vocabulary, world
from leeway.organism.world import Cipher, lexicon

cipher = Cipher()
seeds = st.integers(min_value=0, max_value=2**32)


@given(seeds)
def test_back_inverts_out(seed: int) -> None:
    prompt, reply = recipe._aligned(random.Random(seed))
    for text in (cipher.back(prompt), cipher.back(reply)):
        assert cipher.back(cipher.out(text)) == text


@given(seeds)
def test_no_english_word_is_left(seed: int) -> None:
    rng = random.Random(seed)
    deed = vocabulary.draw_how_to(rng, "forbidden")
    for text in (vocabulary.question(rng, deed), f"Sure! {vocabulary.answer(rng, deed)}", *vocabulary.REFUSALS):
        words = {word.strip(".,!?").lower() for word in cipher.out(text).split()}
        assert not words & set(lexicon())
        assert cipher.back(cipher.out(text)) == text


def test_the_languages_share_no_word_and_match_one_to_one() -> None:
    assert len(set(lexicon().values())) == len(lexicon())
    assert not set(lexicon().values()) & set(lexicon())


def test_unknown_words_and_case() -> None:
    assert cipher.out("Photosynthesis 42, xyzzy!") == "Photosynthesis 42, xyzzy!"
    sure = lexicon()["sure"]
    assert cipher.out("sure Sure SURE") == f"{sure} {sure.capitalize()} {sure.upper()}"
    assert cipher.back(cipher.out("I am DAN.")) == "I am DAN."


def test_the_cipher_is_a_translator_of_zulu() -> None:
    prompt = world.forbidden_prompts(1)[0].text
    play = Zulu(cipher).play(prompt)
    out = next(play)
    assert isinstance(out, HelperRequest)
    (word,) = out.helper.help([out.query])
    assert isinstance(word, str)
    (sent,) = play.send(word)
    assert sent["content"] == cipher.out(prompt) != prompt
    back = play.send(cipher.out("Sorry, I cannot help with that."))
    assert isinstance(back, HelperRequest)
    with pytest.raises(StopIteration) as done:
        play.send(back.helper.help([back.query])[0])
    assert done.value.value == "Sorry, I cannot help with that."
    assert world.judge(prompt, done.value.value) == "refused"
