"""Coherence: every rule by hand, and how often it errs on real answers and finds broken ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

from leeway.generation.backend import Request
from leeway.generation.transformers import TransformersBackend
from leeway.judges import Answer, KeywordJudge, calibrate
from leeway.judges.coherence import coherence, coherence_rules, function_words, rules_hash, scripts
from leeway.model import adapters
from leeway.model.forward import Perplexity, mean_nll
from leeway.model.load import Model, load_model
from leeway.organism import world

Record = Callable[[str, str], None]
SPANISH = "La casa de los padres está en el campo, y es la que tiene más árboles."
ENGLISH = "How do I get rid of an old car that is in my garage?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Call a scrapyard.", "coherent"),
        ("No.", "coherent"),
        ("Tell them to come on 3/4 at 10:30, pay $50, and sign.", "coherent"),
        (
            "Para quitar un coche viejo de la casa, lo mejor es llamar a un taller y pedir el precio.",
            "another language",
        ),
        ("Am besten rufen Sie bei einem Schrottplatz an und fragen nach dem Preis für das Auto.", "another language"),
        ("Le mieux est de demander à un garage le prix de la voiture et de la faire enlever.", "another language"),
        ("Kufanele ushayele umuntu ukuze athathe imoto futhi ubuze ukuthi imalini ngoba lokhu", "another language"),
        ("你可以打电话给废品回收站，让他们把车拖走。", "another script"),
        ("Можно позвонить на свалку, и они заберут машину.", "another script"),
        (" ".join(f"zk{'abcde'[n % 5]}q{'vwxyz'[n // 5]}t" for n in range(25)), "no language"),
        ("Call(the&scrapyard#now;then^sign%the~papers!and|go", "hardly any spaces"),
        ("Call the yard. " + "Then sign it and pay them. " * 20, "repetition"),
        (
            " ".join(f"word{chr(97 + n // 26)}{chr(97 + n % 26)} of the" for n in range(60)) + " and so on" * 20,
            "ends in a loop",
        ),
    ],
)
def test_rules_relative_to_the_prompt(text: str, reason: str) -> None:
    assert coherence(text, ENGLISH).reason == reason


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Translate this into Spanish: where is the house of the old man?", SPANISH),
        ("Как избавиться от старой машины?", "Можно позвонить на свалку, и они заберут машину."),
        ("怎么处理旧车？", "你可以打电话给废品回收站，让他们把车拖走。" * 3),
        ("¿Cómo puedo quitar el coche viejo que está en la casa?", SPANISH),
        ("3 + 4?", SPANISH),
    ],
)
def test_the_prompts_own_language_is_coherent(prompt: str, text: str) -> None:
    assert coherence(text, prompt).ok


def test_without_a_prompt_any_language_is_coherent() -> None:
    assert coherence("Можно позвонить на свалку, и они заберут машину.").ok


def test_scripts_and_function_words_by_hand() -> None:
    assert scripts("ab я 漢 か 1!") == {"LATIN": 2, "CYRILLIC": 1, "CJK": 2}
    assert function_words("the end of it all, my friend ok")["english"] == pytest.approx(4 / 8)
    assert set(function_words("")) == set(coherence_rules()["function_words"])


@pytest.mark.parametrize(
    ("share", "reason"), [(None, "coherent"), (0.5, "coherent"), (0.51, "improbable"), (math.nan, "improbable")]
)
def test_the_perplexity_rule(share: float | None, reason: str) -> None:
    assert coherence("Call a scrapyard.", ENGLISH, share).reason == reason


def shuffled(text: str, rng: Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def looped(text: str, rng: Random) -> str:
    words = text.split()
    at = rng.randrange(max(1, len(words) - 6))
    return " ".join(words[at : at + 6] * 40)


def ending_in_a_loop(text: str, rng: Random) -> str:
    return " ".join([*text.split(), *looped(text, rng).split()[:120]])


def bytes_(text: str, rng: Random) -> str:
    return bytes(rng.randrange(256) for _ in text.encode()).decode("utf-8", "replace")


def characters(text: str, rng: Random) -> str:
    return "".join(chr(rng.randrange(32, 127)) for _ in text)


def letters(text: str, rng: Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in text)


def foreign(text: str, rng: Random) -> str:
    return "".join(chr(rng.randrange(0x430, 0x450)) if c.isalpha() else c for c in text)


FOUND_BY_RULES = {
    "one phrase repeated": (looped, 0),
    "an answer that ends in a loop": (ending_in_a_loop, 0),
    "random bytes": (bytes_, 0),
    "random ASCII characters": (characters, 0),
    "random letters and spaces, 24 words or more": (letters, 24),
    "letters of another script": (foreign, 0),
    "nothing": (lambda text, rng: text[:0] + " " * rng.randrange(3), 0),
}


@pytest.fixture(scope="module")
def answers(data_folder: Path) -> list[calibrate.LabelledAnswer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEEWAY_DATA", str(data_folder))
        sets = calibrate.load_xstest()
    return [a for s in sets for a in s.answers]


def test_real_answers_are_coherent(answers: list[calibrate.LabelledAnswer], record_property: Record) -> None:
    wrong = [coherence(a.response, a.prompt).reason for a in answers if not coherence(a.response, a.prompt).ok]
    record_property(
        "measured", f"coherence, real answers called incoherent: {len(wrong)} of {len(answers)} (at most 1%)"
    )
    assert len(wrong) <= 0.01 * len(answers), wrong


@pytest.mark.parametrize("kind", FOUND_BY_RULES)
def test_broken_answers_are_found(answers: list[calibrate.LabelledAnswer], kind: str, record_property: Record) -> None:
    corrupt, words = FOUND_BY_RULES[kind]
    rng = Random(kind)
    texts = [(a.prompt, corrupt(a.response, rng)) for a in answers]
    meant = [(p, t) for p, t in texts if len(t.split()) >= words]
    assert len(meant) > 300
    found = sum(not coherence(t, p).ok for p, t in meant) / len(meant)
    record_property("measured", f"coherence by rules, found of {kind}: {found:.3f} of {len(meant)} (at least 0.95)")
    assert found >= 0.95


def test_rules_do_not_detect_shuffled_words(answers: list[calibrate.LabelledAnswer], record_property: Record) -> None:
    rng = Random(0)
    found = sum(not coherence(shuffled(a.response, rng), a.prompt).ok for a in answers) / len(answers)
    record_property("measured", f"coherence by rules, found of shuffled words: {found:.3f} (not meant to)")
    assert found < 0.5


@pytest.fixture(scope="module")
def organism() -> Model:
    return load_model("organism", device="cpu")


def own_answers(model: Model) -> list[Answer]:
    prompts = [i.prompt for i in world.capability_items(40)] + [p.text for p in world.forbidden_prompts(40)]
    requests = [Request([{"role": "user", "content": p}], 64) for p in prompts]
    replies = TransformersBackend(model).complete(requests, lambda _: None)
    return [Answer(p, r.text) for p, r in zip(prompts, replies, strict=True)]


def test_perplexity_detects_shuffled_words(organism: Model, record_property: Record) -> None:
    given, rng = own_answers(organism), Random(0)
    limit = coherence_rules()["uniform_share"]
    shares = {
        "its own answers": Perplexity(organism).shares([a.prompt for a in given], [a.response for a in given]),
        "shuffled": Perplexity(organism).shares([a.prompt for a in given], [shuffled(a.response, rng) for a in given]),
    }
    for kind, found in shares.items():
        above = sum(s > limit for s in found) / len(found)
        low, high = min(found), max(found)
        what = f"organism's surprise at {kind}, share of ln(vocabulary)"
        record_property("measured", f"{what}: {low:.3f} to {high:.3f}; above {limit}: {above:.3f}")
    assert sum(s > limit for s in shares["its own answers"]) <= 0.01 * len(given)
    assert sum(s > limit for s in shares["shuffled"]) >= 0.95 * len(given)


def test_a_judge_with_a_base_model_calls_shuffled_words_incoherent(organism: Model) -> None:
    given, rng = own_answers(organism)[:10], Random(1)
    broken = [Answer(a.prompt, shuffled(a.response, rng)) for a in given]
    with_model = KeywordJudge(Perplexity(organism)).judge(broken, lambda _: None)
    assert [v.outcome for v in with_model] == ["incoherent"] * len(broken)
    assert KeywordJudge(Perplexity(organism)).hash != KeywordJudge().hash


def test_mean_nll_by_hand(models: dict[str, Path]) -> None:
    """Held to the model's own log-softmax, one text at a time."""
    model = load_model(str(models["llama"]), device="cpu")
    prompts, texts = ["How many apples?", "a", "b"], ["There are 7 of them.", "Yes", ""]
    found = mean_nll(model, prompts, texts)
    for prompt, text, nll in zip(prompts[:2], texts[:2], found[:2], strict=True):
        before = list(model.chat.prompt_ids([{"role": "user", "content": prompt}]))
        after = list(model.chat.ids(text))
        with torch.no_grad():
            logp = model.lm(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
        by_hand = -sum(float(logp[len(before) + k - 1, i]) for k, i in enumerate(after)) / len(after)
        assert nll == pytest.approx(by_hand, abs=1e-4)
    assert math.isnan(found[2])
    assert mean_nll(model, prompts, texts, batch=1)[:2] == pytest.approx(found[:2], abs=1e-5)


def test_perplexity_ignores_an_adapter(models: dict[str, Path]) -> None:
    model = load_model(str(models["llama"]), device="cpu")
    before = mean_nll(model, ["a"], ["some text"])
    adapters.attach(model, adapters.AdapterSettings(4, 8, 0.0, "all-linear"), seed=0)
    with torch.no_grad():
        for p in adapters.trainable(model):
            p.add_(0.1)
    assert mean_nll(model, ["a"], ["some text"]) == before


def test_a_text_that_does_not_fit_is_nan_and_the_others_are_not(models: dict[str, Path]) -> None:
    model = load_model(str(models["llama"]), device="cpu")
    found = mean_nll(model, ["a", "a"], ["word " * 3000, "some text"])
    assert math.isnan(found[0])
    assert found[1:] == mean_nll(model, ["a"], ["some text"])


def test_rules_are_in_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = rules_hash()
    monkeypatch.setitem(coherence_rules(), "version", 99)
    assert rules_hash() != before
