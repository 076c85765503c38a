"""Translators: nothing lost in splitting, failures named, what was translated kept, NLLB with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leeway.attacks import AttackFailed, Passage
from leeway.errors import LeewayError
from leeway.evals.attack_helpers import ByBackend, Cached, Nllb, chunks, sentences, translated
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick

PAGE = {
    "the cat sat.": "ikati lahlala.",
    "a dog ran.": "inja yagijima.",
    "we eat bread and drink tea.": "sidla isinkwa siphuza itiye.",
}


# --- splitting


@given(st.text(alphabet="ab .!?\n…\"'é"), st.integers(1, 9), st.booleans())
def test_chunks_are_the_text_again_and_none_is_too_long(text: str, limit: int, packed: bool) -> None:
    assert "".join(sentences(text)) == text
    parts = chunks(text, limit, lambda t: len(t.strip()), packed=packed)
    assert "".join(parts) == text
    assert all(len(p.strip()) <= limit for p in parts)


def test_sentences_by_hand() -> None:
    assert sentences('One. Two? "Three!" Four\n\n- five') == ["One. ", "Two? ", '"Three!" ', "Four\n\n", "- five"]
    assert sentences("3.5 is a number") == ["3.5 is a number"]
    assert chunks("One. Two. Three.", 10, len, packed=True) == ["One. Two. ", "Three."]
    assert chunks("one two three four", 9, len, packed=False) == ["one two ", "three ", "four"]


def by(rule: Callable[[str], str | AttackFailed], asked: Sequence[Passage]) -> list[str | AttackFailed]:
    return translated(asked, sentences, lambda _, texts: [rule(t) for t in texts])


def test_white_space_numbers_and_order_stay() -> None:
    text = "1. First.\n\n   Second! 42.\n"
    (found,) = by(lambda t: f"<{t}>", [Passage("out", text)])
    assert found == "1. <First.>\n\n   <Second!> 42.\n"


def test_each_chunk_of_a_direction_is_asked_once() -> None:
    seen: list[tuple[str, list[str]]] = []

    def keep(direction: str, texts: list[str]) -> list[str | AttackFailed]:
        seen.append((direction, texts))
        return [f"{direction} {t}" for t in texts]

    asked = [Passage("back", "a. b."), Passage("out", "b. a."), Passage("back", "b. 7")]
    assert translated(asked, sentences, keep) == ["back a. back b.", "out b. out a.", "back b. 7"]
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
def test_a_failed_translation_is_no_text(text: str, rule: Callable[[str], str], reason: str) -> None:
    failed, fine = by(rule, [Passage("out", text), Passage("out", "17 + 4")])
    assert isinstance(failed, AttackFailed)
    assert str(failed) == reason
    assert fine == "17 + 4"  # nothing to translate


def test_few_words_may_stay_inside_a_longer_text() -> None:
    assert by(lambda t: t if t == "Ada Lovelace." else "xyz.", [Passage("out", "It was her. Ada Lovelace.")]) == [
        "xyz. Ada Lovelace."
    ]


# --- a model behind a backend


@dataclass
class Speaks:
    """A backend that answers by a rule and keeps what it was asked."""

    rule: Callable[[str], Reply]
    asked: list[Request] = field(default_factory=list)
    identity: str = "speaks"
    template_hash: str = "t"

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        self.asked += requests
        tick(len(requests))
        return [self.rule(r.conversation[0]["content"].split("\n<text>")[1].split("</text>")[0]) for r in requests]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        raise NotImplementedError


def tagged(text: str) -> Reply:
    return Reply(f"Here: <translation> {text[::-1]} </translation>", 5, False)


def test_a_backend_translates_chunk_by_chunk() -> None:
    backend = Speaks(tagged)
    found = ByBackend(backend, max_new_tokens=70, limit=10).help(
        [Passage("out", "abc. def. ghi. jkl."), Passage("back", "xyz")]
    )
    assert found == [".fed .cba .lkj .ihg", "zyx"]
    first, last = backend.asked[0], backend.asked[-1]
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
def test_a_backend_that_does_not_translate(reply: Reply, reason: str) -> None:
    (found,) = ByBackend(Speaks(lambda _: reply)).help([Passage("back", "abc def")])
    assert isinstance(found, AttackFailed)
    assert str(found) == reason


def test_the_hash_of_a_backends_translations() -> None:
    one = ByBackend(Speaks(tagged))
    others = [ByBackend(Speaks(tagged, identity="o")), ByBackend(Speaks(tagged, template_hash="o"))]
    others += [ByBackend(Speaks(tagged), limit=9), ByBackend(Speaks(tagged), max_new_tokens=9)]
    assert ByBackend(Speaks(str)).hash == one.hash
    assert len({t.hash for t in [one, *others]}) == 5


# --- a file of translations


@dataclass
class Inner:
    """A translator that counts."""

    hash: str = "inner"
    name: str = "inner"
    asked: list[Passage] = field(default_factory=list)

    def help(self, asked: Sequence[Passage]) -> list[str | AttackFailed]:
        self.asked += asked
        return [AttackFailed("lost") if p.text == "bad" else f"{self.hash}:{p.direction}:{p.text}" for p in asked]


A, B, BAD = Passage("out", "a"), Passage("back", "a"), Passage("out", "bad")


def write(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), "utf-8")
    return path


def test_a_text_is_translated_once_and_a_failure_is_asked_again(tmp_path: Path) -> None:
    path, inner = tmp_path / "new" / "zulu.jsonl", Inner()
    found = Cached(path, inner).help([A, BAD, A, B])
    assert [str(f) for f in found] == ["inner:out:a", "lost", "inner:out:a", "inner:back:a"]
    assert inner.asked == [A, BAD, B]
    again = Inner()
    assert [str(f) for f in Cached(path, again).help([B, BAD, A])] == ["inner:back:a", "lost", "inner:out:a"]
    assert again.asked == [BAD]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"direction": d, "source": "a", "text": f"inner:{d}:a", "by": "inner"} for d in ("out", "back")
    ]


def test_without_a_translator_a_missing_text_is_a_failure(tmp_path: Path) -> None:
    path = write(tmp_path / "z.jsonl", {"direction": "out", "source": "a", "text": "b"})
    found = Cached(path).help([A, B])
    assert found[0] == "b"
    assert isinstance(found[1], AttackFailed)
    assert "no translation (back) in z.jsonl" in str(found[1])
    with pytest.raises(LeewayError, match="no such file"):
        Cached(tmp_path / "none.jsonl")


def test_reviewed_lines_stand_whoever_translates(tmp_path: Path) -> None:
    path = write(
        tmp_path / "z.jsonl",
        {"direction": "out", "source": "a", "text": "first", "by": "inner"},
        {"direction": "out", "source": "a", "text": "read", "by": "inner", "reviewed": True},
        {"direction": "back", "source": "a", "text": "old", "by": "another"},
        {"direction": "out", "source": "c", "text": "machine", "by": "inner"},
        {"direction": "out", "source": "c", "text": "by hand"},
        {"direction": "back", "source": "b", "text": "b", "reviewed": True},
    )
    assert Cached(path, Inner()).help([A, Passage("back", "b"), Passage("out", "c")]) == [
        "read",
        "b",
        "by hand",
    ]
    other = Cached(path, Inner("other"))
    assert other.help([A, B]) == ["read", "other:back:a"]  # another translator's words are not taken for its own


def test_the_hash_stays_while_the_file_grows_and_moves_with_what_was_reviewed(tmp_path: Path) -> None:
    path = write(tmp_path / "z.jsonl", {"direction": "out", "source": "a", "text": "b"})
    one = Cached(path, Inner())
    one.help([B])
    assert len(path.read_text().splitlines()) == 2
    assert Cached(path, Inner()).hash == one.hash
    assert Cached(path, Inner("other")).hash != one.hash
    alone = Cached(path)
    assert alone.hash != one.hash
    write(path, {"direction": "out", "source": "a", "text": "c"})
    assert len({Cached(path, Inner()).hash, one.hash, Cached(path).hash, alone.hash}) == 4


def test_two_that_write_at_once_agree(tmp_path: Path) -> None:
    left, right = Cached(tmp_path / "z.jsonl", Inner()), Cached(tmp_path / "z.jsonl", Drifts())
    assert left.help([A]) == right.help([A]) == ["inner:out:a"]
    assert len((tmp_path / "z.jsonl").read_text().splitlines()) == 1


class Drifts(Inner):
    """The same translator in name, in other words."""

    def help(self, asked: Sequence[Passage]) -> list[str | AttackFailed]:
        return [f"drift {p.text}" for p in asked]


def test_a_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "z.jsonl"
    path.write_text('{"direction": "out", "source": "a", "text": "é"}', "utf-8")
    Cached(path, Inner()).help([B])
    assert Cached(path).help([A, B]) == ["é", "inner:back:a"]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (['{"direction": "out"'], "line 1: not JSON"),
        (["[]"], "line 1: not a translation"),
        (['{"direction": "in", "source": "a", "text": "b"}'], "line 1: not a translation"),
        (["", '{"direction": "out", "source": "a", "text": " "}'], "line 2: not a translation"),
        (['{"direction": "out", "source": "a", "text": "b", "reviewed": 1}'], "line 1: reviewed is neither"),
        ([f'{{"direction": "out", "source": "a", "text": "{t}", "reviewed": true}}' for t in "bc"], "line 2: another"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, lines: list[str], fault: str) -> None:
    path = tmp_path / "z.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LeewayError, match=fault):
        Cached(path, Inner())


# --- NLLB


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny M2M100 with an NLLB tokenizer of single characters that has learned PAGE by heart, both ways."""
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
    ways = [("eng_Latn", "zul_Latn", e, z) for e, z in PAGE.items()] + [
        ("zul_Latn", "eng_Latn", z, e) for e, z in PAGE.items()
    ]
    learn(lm, tokenizer, ways)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learn(lm: torch.nn.Module, tokenizer: object, ways: list[tuple[str, str, str, str]]) -> None:
    def ids(lang: str, text: str) -> list[int]:
        tokenizer.src_lang = lang  # type: ignore[attr-defined]
        return list(tokenizer(text)["input_ids"])  # type: ignore[operator]

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([r + [fill] * (longest - len(r)) for r in rows])

    sources = [ids(a, s) for a, _, s, _ in ways]
    targets = [ids(b, t) for _, b, _, t in ways]
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


def test_nllb_out_and_back_sentence_by_sentence(nllb: Path) -> None:
    english, zulu = list(PAGE), list(PAGE.values())
    text, other = f"1. {english[0]} {english[2]}\n\n{english[1]}", f"1. {zulu[0]} {zulu[2]}\n\n{zulu[1]}"
    asked = [Passage("out", text), Passage("back", other), *(Passage("out", e) for e in english)]
    for batch, beams in ((1, 1), (2, 3), (16, 4)):
        found = Nllb(str(nllb), batch=batch, beams=beams, max_new_tokens=40, device="cpu").help(asked)
        assert found == [other, text, *zulu]


def test_nllb_cut_short_is_a_failure(nllb: Path) -> None:
    (found,) = Nllb(str(nllb), max_new_tokens=5, device="cpu").help([Passage("out", "the cat sat.")])
    assert isinstance(found, AttackFailed)
    assert str(found) == "a translation was cut off"


def test_nllb_is_loaded_when_asked_and_known_by_its_files(nllb: Path, tmp_path: Path) -> None:
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


def test_nllb_that_is_not_there_or_is_something_else(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(LeewayError, match="cannot be loaded"):
        Nllb(str(tmp_path)).help([A])
    with pytest.raises(LeewayError, match="cannot be loaded"):
        Nllb(str(models["llama"])).help([A])
