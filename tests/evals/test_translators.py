"""Translators: splitting, failures, a model as translator, and NLLB with a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leeway.attacks import AttackFailed, Passage
from leeway.errors import LeewayError
from leeway.evals.attack_helpers import LlmTranslator, Nllb, chunks, sentences, translate_passages
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick

PAGE = {
    "the cat sat.": "ikati lahlala.",
    "a dog ran.": "inja yagijima.",
    "we eat bread and drink tea.": "sidla isinkwa siphuza itiye.",
}


# --- splitting


@given(st.text(alphabet="ab .!?\n…\"'é"), st.integers(1, 9), st.booleans())
def test_chunks_join_to_the_text_and_respect_the_limit(text: str, limit: int, packed: bool) -> None:
    assert "".join(sentences(text)) == text
    parts = chunks(text, limit, lambda t: len(t.strip()), packed=packed)
    assert "".join(parts) == text
    assert all(len(p.strip()) <= limit for p in parts)


def test_sentences_by_hand() -> None:
    assert sentences('One. Two? "Three!" Four\n\n- five') == ["One. ", "Two? ", '"Three!" ', "Four\n\n", "- five"]
    assert sentences("3.5 is a number") == ["3.5 is a number"]
    assert chunks("One. Two. Three.", 10, len, packed=True) == ["One. Two. ", "Three."]
    assert chunks("one two three four", 9, len, packed=False) == ["one two ", "three ", "four"]


def translate(rule: Callable[[str], str | AttackFailed], passages: Sequence[Passage]) -> list[str | AttackFailed]:
    return translate_passages(passages, sentences, lambda _, texts: [rule(t) for t in texts])


def test_white_space_numbers_and_order_are_kept() -> None:
    text = "1. First.\n\n   Second! 42.\n"
    (found,) = translate(lambda t: f"<{t}>", [Passage("out", text)])
    assert found == "1. <First.>\n\n   <Second!> 42.\n"


def test_each_chunk_of_a_direction_is_translated_once() -> None:
    seen: list[tuple[str, list[str]]] = []

    def record(direction: str, texts: list[str]) -> list[str | AttackFailed]:
        seen.append((direction, texts))
        return [f"{direction} {t}" for t in texts]

    passages = [Passage("back", "a. b."), Passage("out", "b. a."), Passage("back", "b. 7")]
    assert translate_passages(passages, sentences, record) == ["back a. back b.", "out b. out a.", "back b. 7"]
    assert seen == [("out", ["b.", "a."]), ("back", ["a.", "b."])]


@pytest.mark.parametrize(
    ("text", "rule", "reason"),
    [
        ("Hello there.", lambda _: "", "a translation is empty"),
        ("Hello there.", lambda t: t.upper(), "a translation is the text itself"),
        ("One two three four. Five.", lambda t: t if "two" in t else "other", "a translation is the text itself"),
        ("One. Two.", lambda t: AttackFailed("lost") if t == "Two." else "x", "lost"),
    ],
)
def test_a_failed_translation_is_a_failure(text: str, rule: Callable[[str], str], reason: str) -> None:
    failed, fine = translate(rule, [Passage("out", text), Passage("out", "17 + 4")])
    assert isinstance(failed, AttackFailed)
    assert str(failed) == reason
    assert fine == "17 + 4"  # nothing to translate


def test_a_few_words_of_a_longer_text_may_stay_unchanged() -> None:
    assert translate(
        lambda t: t if t == "Ada Lovelace." else "xyz.", [Passage("out", "It was her. Ada Lovelace.")]
    ) == ["xyz. Ada Lovelace."]


# --- a model behind a backend


@dataclass
class RuleBackend:
    """A backend that replies by a rule and records its requests."""

    rule: Callable[[str], Reply]
    requests: list[Request] = field(default_factory=list)
    identity: str = "rule"
    template_hash: str = "t"

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        self.requests += requests
        tick(len(requests))
        return [self.rule(r.conversation[0]["content"].split("\n<text>")[1].split("</text>")[0]) for r in requests]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        raise NotImplementedError


def tagged(text: str) -> Reply:
    return Reply(f"Here: <translation> {text[::-1]} </translation>", 5, False)


def test_a_model_translates_chunk_by_chunk() -> None:
    backend = RuleBackend(tagged)
    found = LlmTranslator(backend, max_new_tokens=70, limit=10).help(
        [Passage("out", "abc. def. ghi. jkl."), Passage("back", "xyz")]
    )
    assert found == [".fed .cba .lkj .ihg", "zyx"]
    first, last = backend.requests[0], backend.requests[-1]
    assert (first.max_new_tokens, first.temperature) == (70, 0.0)
    assert "from English to Zulu" in first.conversation[0]["content"]
    assert "from Zulu to English" in last.conversation[0]["content"]
    assert "{" not in first.conversation[0]["content"]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("", 0, False, "503"), "no answer: translator: 503"),
        (Reply("<translation>x</translation>", 9, True), "a translation was cut off"),
        (Reply("I cannot translate this.", 9, False), "the translator wrote no translation"),
        (Reply("<translation> </translation>", 9, False), "a translation is empty"),
        (Reply("<translation>abc def</translation>", 9, False), "a translation is the text itself"),
    ],
)
def test_failures_of_a_model(reply: Reply, reason: str) -> None:
    (found,) = LlmTranslator(RuleBackend(lambda _: reply)).help([Passage("back", "abc def")])
    assert isinstance(found, AttackFailed)
    assert str(found) == reason


def test_the_hash_of_a_model() -> None:
    one = LlmTranslator(RuleBackend(tagged))
    others = [LlmTranslator(RuleBackend(tagged, identity="o")), LlmTranslator(RuleBackend(tagged, template_hash="o"))]
    others += [LlmTranslator(RuleBackend(tagged), limit=9), LlmTranslator(RuleBackend(tagged), max_new_tokens=9)]
    assert LlmTranslator(RuleBackend(str)).hash == one.hash
    assert len({t.hash for t in [one, *others]}) == 5


# --- NLLB


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny M2M100 with an NLLB tokenizer of single characters that has memorised PAGE in both directions."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    folder = tmp_path_factory.mktemp("nllb")
    letters = ["▁", *sorted(set("".join([*PAGE, *PAGE.values()])) - {" "})]
    vocab = {t: k for k, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    tokenizer = NllbTokenizer(vocab=vocab, merges=[], extra_special_tokens=["eng_Latn", "zul_Latn"])
    torch.manual_seed(0)
    lm = M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=len(tokenizer),
            d_model=48,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            max_position_embeddings=128,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
            scale_embedding=True,
        )
    )
    directions = [("eng_Latn", "zul_Latn", e, z) for e, z in PAGE.items()] + [
        ("zul_Latn", "eng_Latn", z, e) for e, z in PAGE.items()
    ]
    memorise(lm, tokenizer, directions)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def memorise(lm: torch.nn.Module, tokenizer: object, directions: list[tuple[str, str, str, str]]) -> None:
    def ids(lang: str, text: str) -> list[int]:
        tokenizer.src_lang = lang  # type: ignore[attr-defined]
        return list(tokenizer(text)["input_ids"])  # type: ignore[operator]

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([r + [fill] * (longest - len(r)) for r in rows])

    sources = [ids(a, s) for a, _, s, _ in directions]
    targets = [ids(b, t) for _, b, _, t in directions]
    inputs, mask = padded(sources, 1), padded([[1] * len(s) for s in sources], 0)
    before, labels = padded([[2, *t[:-1]] for t in targets], 1), padded(targets, -100)
    optimiser = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    lm.train()
    for _ in range(400):
        loss = lm(input_ids=inputs, attention_mask=mask, decoder_input_ids=before, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss.item() < 0.01:
            break
    lm.eval()


def test_nllb_translates_sentence_by_sentence(nllb: Path) -> None:
    english, zulu = list(PAGE), list(PAGE.values())
    text, other = f"1. {english[0]} {english[2]}\n\n{english[1]}", f"1. {zulu[0]} {zulu[2]}\n\n{zulu[1]}"
    passages = [Passage("out", text), Passage("back", other), *(Passage("out", e) for e in english)]
    for batch, beams in ((1, 1), (2, 3), (16, 4)):
        found = Nllb(str(nllb), batch=batch, beams=beams, max_new_tokens=40, device="cpu").help(passages)
        assert found == [other, text, *zulu]


def test_a_truncated_nllb_translation_is_a_failure(nllb: Path) -> None:
    (found,) = Nllb(str(nllb), max_new_tokens=5, device="cpu").help([Passage("out", "the cat sat.")])
    assert isinstance(found, AttackFailed)
    assert str(found) == "a translation was cut off"


def test_nllb_is_loaded_on_first_use_and_hashed_by_its_files(nllb: Path, tmp_path: Path) -> None:
    one = Nllb(str(nllb))
    assert one.hash == Nllb(str(nllb), batch=3, device="cpu").hash
    assert "_loaded" not in vars(one)
    others = [Nllb(str(nllb), beams=1), Nllb(str(nllb), limit=9), Nllb(str(nllb), max_new_tokens=9)]
    for file in nllb.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert Nllb(str(tmp_path)).hash == one.hash
    config = tmp_path / "config.json"
    config.write_text(config.read_text() + "\n")
    others.append(Nllb(str(tmp_path)))
    assert len({t.hash for t in [one, *others]}) == 5


def test_nllb_that_is_missing_or_another_model(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(LeewayError, match="cannot be loaded"):
        Nllb(str(tmp_path)).help([Passage("out", "a")])
    with pytest.raises(LeewayError, match="cannot be loaded"):
        Nllb(str(models["llama"])).help([Passage("out", "a")])
