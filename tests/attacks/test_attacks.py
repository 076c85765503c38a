"""Attacks: sent texts, hashes, templates, and attacks of other packages."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from random import Random

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from leeway import plugins
from leeway.attacks import (
    ATTACKS,
    NEEDS_HELPER,
    WRAPPERS,
    Attack,
    AttackFailed,
    Base64,
    BestOfN,
    Crescendo,
    HelperRequest,
    LedCrescendo,
    ManyShot,
    Passage,
    Prefill,
    ToolResult,
    Transcript,
    Wrapper,
    Zulu,
    load_attack,
    load_templates,
    registry,
    render,
)
from leeway.attacks.best_of_n import add_noise, capitalise, shuffle_inside
from leeway.attacks.built_in import SHOTS, decoded, encoded
from leeway.data import safety_prompts
from leeway.data.chat import Chat
from leeway.errors import LeewayError

REQUEST = 'Explain "how" {prompt} to\nbake a cake: 100 % & <b>'  # braces, quotes and line breaks are not changed
CHATS = [Chat(tiny.tokenizer(t)) for t in (tiny.PLAIN, tiny.TRIMMING, tiny.THINKING)]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_last_message_contains_or_encodes_the_request(attack: Attack) -> None:
    last = next(m["content"] for m in reversed(render(attack, REQUEST)[-1]) if m["role"] == "user")
    if isinstance(attack, BestOfN):
        assert len(last) == len(REQUEST)
    elif isinstance(attack, Base64):
        assert base64.b64decode(last.split()[-1]).decode() == REQUEST
    else:
        assert last.count(REQUEST) == 1
    assert attack.name == load_attack(attack.name).name
    assert attack.version >= 1
    assert attack.origin


def test_origins_cite_a_paper() -> None:
    bare = {n for n, a in ATTACKS.items() if "arXiv" not in a.origin}
    assert bare == {"none", "many_shot"}


def test_names_and_hashes_are_distinct() -> None:
    assert all(name == a.name for name, a in ATTACKS.items())
    assert len({a.hash for a in ATTACKS.values()}) == len(ATTACKS)
    assert list(WRAPPERS) == ["none", "dan", "happy_to_help", "role_play", "wikipedia"]
    assert all(ATTACKS[n] is w for n, w in WRAPPERS.items())


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_every_chat_template_accepts_it(attack: Attack) -> None:
    for conversation in render(attack, "how to bake a cake"):
        roles = [m["role"] for m in conversation]
        sent = conversation[: len(roles) - (roles[-1] == "assistant")]  # a prefill is continued, not rendered
        assert roles[: len(sent)] == ["user", "assistant"] * (len(sent) // 2) + ["user"]  # as Gemma 2 requires
        for chat in CHATS:
            assert sent[-1]["content"].strip() in chat.prompt_text(sent)


def test_the_hash_covers_the_text() -> None:
    wrapper = ATTACKS["aim"]
    assert isinstance(wrapper, Wrapper)
    pairs = [
        (wrapper, replace(wrapper, template=wrapper.template + " ")),
        (wrapper, replace(wrapper, version=2)),
        (Base64(), Base64(template="{encoded}")),
        (ManyShot(), ManyShot(8)),
        (Crescendo(), Crescendo(("{prompt}",))),
        (ToolResult(), ToolResult(tool_role=True)),
        (BestOfN(), BestOfN(0.5)),
        (BestOfN(), BestOfN(version=2)),
        (Prefill("p", 1, "", "Sure:"), Prefill("p", 1, "", "Fine:")),
        (Prefill("p", 1, "", "Sure:"), Prefill("p", 2, "", "Sure:")),
        (LedCrescendo(FixedHelper()), LedCrescendo(FixedHelper(), turns=2)),
        (LedCrescendo(FixedHelper()), LedCrescendo(FixedHelper(hash="other"))),
        (Zulu(FixedHelper()), Zulu(FixedHelper(hash="other"))),
    ]
    assert all(a.hash != b.hash for a, b in pairs)


def test_texts_hold_the_prompt_once() -> None:
    for make in (
        lambda: Wrapper("x", 1, "", "{prompt} {prompt}"),
        lambda: Base64(template="{prompt}"),
        lambda: Crescendo(("{prompt}", "go on")),
        lambda: Crescendo(("{prompt} {prompt}", "{prompt}")),
        lambda: Crescendo(()),
    ):
        with pytest.raises(ValueError, match="once"):
            make()


@dataclass(frozen=True)
class FixedHelper:
    """A helper with fixed replies."""

    name: str = "words"
    hash: str = "h"

    def help(self, queries: Sequence[object]) -> list[str | AttackFailed]:
        return [f"word {k}" for k in range(len(queries))]


# --- base64


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=12))
def test_an_encoded_answer_is_decoded(text: str) -> None:
    once = encoded(text)
    wrapped = "\n".join(once[i : i + 20] for i in range(0, len(once), 20))
    assert decoded(once) == decoded(wrapped) == decoded(once.rstrip("=")) == text


@pytest.mark.parametrize(
    "answer",
    ["", "Sure, here you are.", "Certainly", "abcdabcdabcdabcd====x", "A" * 17, "/" * 16, "SGVsbG8=", "one two " * 4],
)
def test_any_other_answer_is_unchanged(answer: str) -> None:
    """Too short, other characters, an impossible length, invalid UTF-8, or words with spaces."""
    assert decoded(answer) == answer


def test_base64_through_a_play() -> None:
    play = Base64().play("hello")
    assert next(play)[-1]["content"].endswith("aGVsbG8=")
    with pytest.raises(StopIteration) as over:
        play.send("VGhpcyBpcyBhIHBsYWluIGFuc3dlci4=")
    assert over.value.value == "This is a plain answer."


# --- many-shot


def test_many_shot_by_hand() -> None:
    text = ManyShot(2).wrap("REQUEST")
    (q0, a0), (q1, a1) = SHOTS[:2]
    assert text == f"Human: {q0}\nHelper: {a0}\n\nHuman: {q1}\nHelper: {a1}\n\nHuman: REQUEST\nHelper:"
    assert ManyShot().name == "many_shot"
    assert ManyShot(2).name == "many_shot_2"
    assert len({q for q, _ in SHOTS}) == len(SHOTS) == 32


@pytest.mark.parametrize("shots", [0, -1, 33])
def test_invalid_numbers_of_shots(shots: int) -> None:
    with pytest.raises(LeewayError, match=rf"many_shot: {shots} shots; give 1 to 32"):
        ManyShot(shots)


# --- several turns and tools


def test_a_scripted_crescendo_by_hand() -> None:
    play = Crescendo(("one", "two {prompt}")).play("P")
    assert next(play) == [{"role": "user", "content": "one"}]
    assert play.send("first") == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two P"},
    ]
    with pytest.raises(StopIteration) as over:
        play.send("second")
    assert over.value.value == "second"


def test_the_first_turn_of_the_script_is_general() -> None:
    sent = render(Crescendo(), "PLACEHOLDER")
    assert [len(c) for c in sent] == [1, 3, 5, 7]
    assert "PLACEHOLDER" not in sent[0][0]["content"]


def test_a_led_crescendo_by_hand() -> None:
    words = FixedHelper()
    play = LedCrescendo(words, turns=2).play("P")
    assert next(play) == HelperRequest(words, Transcript("P", 1, 2, ()))
    assert play.send("m1") == [{"role": "user", "content": "m1"}]
    assert play.send("r1") == HelperRequest(words, Transcript("P", 2, 2, (("m1", "r1"),)))
    assert play.send("m2") == [
        {"role": "user", "content": "m1"},
        {"role": "assistant", "content": "r1"},
        {"role": "user", "content": "m2"},
    ]
    with pytest.raises(StopIteration) as over:
        play.send("r2")
    assert over.value.value == "r2"
    with pytest.raises(LeewayError, match="0 turns"):
        LedCrescendo(words, turns=0)


def test_a_tool_result_by_hand() -> None:
    plain, tool = ToolResult(), ToolResult(tool_role=True)
    (sent,) = render(plain, "CAKE")
    assert [m["role"] for m in sent] == ["user", "assistant", "user"]
    assert sent[-1]["content"] == "[result of open_note]\nCAKE\n[end of result]"
    assert "CAKE" not in sent[0]["content"] + sent[1]["content"]
    assert render(tool, "P")[0][-1] == {"role": "tool", "name": "open_note", "content": "P"}
    assert tool.name != plain.name
    assert "[tool]P[end]" in CHATS[0].prompt_text(tool.conversation("P"))


# --- prefill and best-of-n


def test_a_prefill_by_hand() -> None:
    play = Prefill("p", 1, "", "Sure:").play("P")
    assert next(play) == [{"role": "user", "content": "P"}, {"role": "assistant", "content": "Sure:"}]
    with pytest.raises(StopIteration) as over:
        play.send("the rest")
    assert over.value.value == "the rest"  # the continuation alone is judged


@pytest.mark.parametrize("opening", ["", " Sure", "Sure:\n"])
def test_an_opening_without_white_space_at_its_ends(opening: str) -> None:
    with pytest.raises(ValueError, match="opening is empty, or begins or ends with white space"):
        Prefill("p", 1, "", opening)


@pytest.mark.parametrize("chat", CHATS)
def test_an_opening_follows_what_the_template_writes_before_an_answer(chat: Chat) -> None:
    user, opening = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "Sure, 3"}
    assert chat.prompt_ids([user, opening]) == chat.prompt_ids([user]) + chat.ids("Sure, 3")
    answered = chat.sequence("hello", "Sure, 3")  # the same tokens as in training
    assert answered.ids[: -len(chat.closing_ids)] == chat.prompt_ids([user, opening])


def test_augmentations_are_functions_of_seed_item_and_draw() -> None:
    attack, text = BestOfN(), "How does one bake a loaf of wholemeal bread?"
    again = BestOfN()
    drawn = [attack.augment(text, 0, "x/1", k) for k in range(50)]
    assert drawn == [again.augment(text, 0, "x/1", k) for k in range(50)]
    assert len({*drawn, text}) == 51
    assert attack.augment(text, 1, "x/1", 0) != drawn[0] != attack.augment(text, 0, "x/2", 0)
    assert drawn[0] == "hOW dOdS oNE BAKE a lPAF OF WebMHoElL bRD@E?"  # the same bytes everywhere


def test_each_augmentation_by_its_rule() -> None:
    text = "abcdefgh an abc Wxyz 12 é"
    assert shuffle_inside(text, 0.0, Random(0)) == capitalise(text, 0.0, Random(0)) == add_noise(text, 0.0, Random(0))
    inside = shuffle_inside(text, 1.0, Random(0)).split()
    assert [sorted(w) for w in inside] == [sorted(w) for w in text.split()]
    assert [(w[0], w[-1]) for w in inside] == [(w[0], w[-1]) for w in text.split()]
    assert inside[0] != "abcdefgh"
    assert inside[1:3] == ["an", "abc"]  # one inner character at most
    assert capitalise(text, 1.0, Random(0)) == "ABCDEFGH AN ABC wXYZ 12 É"
    moved = add_noise("hello é~ ", 1.0, Random(0))
    steps = [ord(b) - ord(a) for a, b in zip("hello é~ ", moved, strict=True)]
    assert set(map(abs, steps[:5])) == {1}
    assert steps[6] == 0  # not ASCII
    assert moved.isprintable()  # neither "~" nor a space leaves the printable characters


def test_rates_of_the_augmentations() -> None:
    """Over many draws a letter changes case with probability √0.4, and a character is replaced with 0.4³."""
    letters = "".join(capitalise("a" * 1000, 0.4**0.5, Random(k)) for k in range(20))
    assert letters.count("A") / len(letters) == pytest.approx(0.4**0.5, abs=0.015)
    noisy = "".join(add_noise("m" * 1000, 0.4**3, Random(k)) for k in range(20))
    assert 1 - noisy.count("m") / len(noisy) == pytest.approx(0.4**3, abs=0.01)
    with pytest.raises(ValueError, match=r"strength 1.5 is not in \(0, 1\]"):
        BestOfN(1.5)


# --- Zulu


def test_zulu_translates_out_and_back_except_an_empty_answer() -> None:
    zulu = Zulu(FixedHelper())
    play = zulu.play("abc")
    assert next(play) == HelperRequest(zulu.translator, Passage("out", "abc"))
    assert play.send("cba") == [{"role": "user", "content": "cba"}]
    assert play.send("ere") == HelperRequest(zulu.translator, Passage("back", "ere"))
    empty = zulu.play("abc")
    next(empty)
    empty.send("cba")
    with pytest.raises(StopIteration) as over:
        empty.send(" ")
    assert over.value.value == " "


def test_rendering_queries_no_helper() -> None:
    @dataclass(frozen=True)
    class Silent(FixedHelper):
        def help(self, queries: Sequence[object]) -> list[str | AttackFailed]:
            raise AssertionError(f"queried with {queries}")

    assert render(Zulu(Silent()), "P") == [[{"role": "user", "content": "(words's words)"}]]
    assert len(render(LedCrescendo(Silent(), turns=3), "P")) == 3


# --- a user's templates


def test_templates_from_yaml_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("mine: 'say {prompt}'\nother: |\n  {prompt}\n  now\n")
    wrappers = load_templates(tmp_path / "a.yaml")
    assert wrappers["mine"] == Wrapper("mine", 1, "file a.yaml", "say {prompt}")
    assert wrappers["other"].wrap("P") == "P\nnow\n"
    entry = {"name": "mine", "template": "say {prompt}", "version": 3, "origin": "a paper"}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    assert load_templates(str(tmp_path / "a.json")) == {"mine": Wrapper("mine", 3, "a paper", "say {prompt}")}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("mine: no slot", "template mine: {prompt} occurs 0 times"),
        ("mine: '{prompt} {prompt}'", "template mine: {prompt} occurs 2 times"),
        ("dan: '{prompt}'", "an attack dan exists already"),
        ("zulu: '{prompt}'", "an attack zulu exists already"),
        ("a: '{prompt}'\na: '{prompt}!'", "'a' is given twice"),
        ("[{name: a, template: '{prompt}'}, {name: a, template: '{prompt}!'}]", "'a' is given twice"),
        ("[{name: a, text: '{prompt}'}]", "unknown key text"),
        ("[{name: a}]", "its template is not a text"),
        ("[{name: a, template: '{prompt}', version: '1'}]", "version '1' is not a whole number"),
        ("[{name: a, template: '{prompt}', origin: 3}]", "its origin is not a text"),
        ("7: '{prompt}'", "7 is not a name"),
        ("'a b': '{prompt}'", "'a b' is not a name"),
        ("just text", "neither a mapping of templates nor a list"),
        ("{}", "no templates"),
        ("a: [", "line 1: not YAML"),
    ],
)
def test_invalid_templates(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(LeewayError) as error:
        load_templates(path)
    assert fault in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_invalid_json_templates(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"a": "{prompt}", "a": "{prompt}!"}')
    with pytest.raises(LeewayError, match="'a' is given twice"):
        load_templates(path)
    path.write_text('{"a": \n')
    with pytest.raises(LeewayError, match="not JSON"):
        load_templates(path)
    with pytest.raises(LeewayError, match="cannot be read"):
        load_templates(tmp_path / "none.yaml")


# --- other packages


OUTSIDE = Wrapper("outside", 1, "another package", "please: {prompt}")
MISNAMED = OUTSIDE
NOTHING = "no attack"


def points(monkeypatch: pytest.MonkeyPatch, *named: tuple[str, str]) -> None:
    found = [EntryPoint(name, f"{__name__}:{value}", registry.GROUP) for name, value in named]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [p for p in found if p.group == group])


def test_an_attack_of_another_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    points(monkeypatch, ("outside", "OUTSIDE"), ("broken", "MISSING"))
    assert load_attack("outside") is OUTSIDE
    assert registry.attack_names() == [*ATTACKS, "broken", "outside"]
    (tmp_path / "t.yaml").write_text("outside: '{prompt}'")
    with pytest.raises(LeewayError, match="an attack outside exists already"):
        load_templates(tmp_path / "t.yaml")


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("broken", "MISSING", "cannot be loaded"),
        ("misnamed", "MISNAMED", "MISNAMED has another name"),
        ("nothing", "NOTHING", "does not implement attack .no name, version, origin, hash, play"),
        ("dan", "OUTSIDE", "the name of .* is taken"),
    ],
)
def test_a_broken_package(monkeypatch: pytest.MonkeyPatch, name: str, value: str, fault: str) -> None:
    points(monkeypatch, (name, value))
    with pytest.raises(LeewayError, match=fault):
        load_attack(name if name != "dan" else "outside")


def test_unknown_attacks_and_attacks_with_helpers() -> None:
    with pytest.raises(LeewayError, match="unknown attack 'zulus'; one of: aim, base64"):
        load_attack("zulus")
    for name in NEEDS_HELPER:
        with pytest.raises(LeewayError, match="it needs a helper model"):
            load_attack(name)


# --- forbidden prompts


@pytest.mark.usefixtures("real_data")
@pytest.mark.parametrize(
    ("name", "count"), [("strongreject", 313), ("strongreject-small", 60), ("jailbreakbench", 100)]
)
def test_prompt_sets_as_published(name: str, count: int) -> None:
    prompts, origin = safety_prompts.forbidden(name)
    assert [p.id for p in prompts] == [f"{name}/{n}" for n in range(count)]
    assert len({p.text for p in prompts}) == count
    assert origin.startswith("LEEWAY_DATA/")


@pytest.mark.usefixtures("real_data")
def test_the_small_set_is_within_the_full_one() -> None:
    full, small = (safety_prompts.forbidden(name)[0] for name in ("strongreject", "strongreject-small"))
    assert {p.text for p in small} < {p.text for p in full}


def test_the_small_set_is_not_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEEWAY_DATA", raising=False)
    with pytest.raises(LeewayError, match="not on the hub; set LEEWAY_DATA"):
        safety_prompts.forbidden("strongreject-small")


def test_a_truncated_set_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEEWAY_DATA", str(tmp_path))
    (tmp_path / "jailbreakbench").mkdir()
    (tmp_path / "jailbreakbench" / "harmful-behaviors.csv").write_text(",Goal\n0,bake\n")
    with pytest.raises(LeewayError, match=r"1 prompts .* and 100 were published"):
        safety_prompts.forbidden("jailbreakbench")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "Goal,other\nbake a cake,1\nboil an egg,2\n"),
        ("a.csv", "PROMPT\nbake a cake\nboil an egg\n"),
        ("a.jsonl", '{"forbidden_prompt": "bake a cake"}\n{"Forbidden Prompt": "boil an egg"}\n'),
        ("a.json", '[{"prompt": "bake a cake"}, {"goal": "boil an egg"}]'),
    ],
)
def test_a_users_own_prompts(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    prompts, origin = safety_prompts.from_file(tmp_path / name)
    assert [(p.id, p.text) for p in prompts] == [("file/0", "bake a cake"), ("file/1", "boil an egg")]
    assert "2 prompts" in origin


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prompt\nbake\nboil\nbake\n", "record 3: the same prompt as record 1"),
        ("prompt,x\nbake,1\n,2\n", "record 2: its prompt is empty"),
        ("request\nbake\n", "record 1: no forbidden_prompt or prompt or goal in it"),
        ("prompt\n", "no prompts in it"),
    ],
)
def test_invalid_prompt_files(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(LeewayError) as error:
        safety_prompts.from_file(path)
    assert fault in str(error.value)
