"""Thinking before answers: where it ends, what is judged, what is kept, and how templates begin it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import tiny

from leeway import Study
from leeway.attacks import ATTACKS
from leeway.cache import RecordStore
from leeway.data.chat import Chat
from leeway.data.types import BenignPrompt, CapabilityItem, ForbiddenPrompt
from leeway.errors import LeewayError
from leeway.evals.capability import Capability, grade_gsm8k
from leeway.evals.eval import Row, is_retryable
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.overrefusal import OverRefusal
from leeway.generation.backend import CUT_THINKING, ENDED_THINKING, Choice, Conversation, Reply, Request, Tick
from leeway.generation.cache import CachedBackend
from leeway.generation.openai_api import ApiSettings, parse_reply
from leeway.generation.thinking import final_answer, full_text, split_thinking, without_thinking
from leeway.generation.transformers import TransformersBackend
from leeway.generation.vllm import VllmBackend
from leeway.judges import Answer, Verdict
from leeway.model.load import load_model
from leeway.stats import thinking

USER = [{"role": "user", "content": "hello"}]
ANSWERED = "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}[end]\n{% endfor %}"
# opens a thought for a new answer only, as DeepSeek-R1 does
OPENING = ANSWERED + "{% if add_generation_prompt %}[assistant]\n<think>\n{% endif %}"
# opens it, and closes an empty one before a given answer, as Qwen 3's thinking models do
CLOSING = tiny.THINKING.replace("[assistant]\n{% endif %}", "[assistant]\n<think>\n{% endif %}")
# an empty thought in the prompt unless enable_thinking, as Qwen 3's hybrid models do
HYBRID = tiny.THINKING.replace(
    "[assistant]\n{% endif %}",
    "[assistant]\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("plain", False, ("", "plain")),
        ("<think>\nabc\n</think>\n\nfinal", False, ("abc", "final")),
        ("  <think>abc</think>final <think> not a thought", False, ("abc", "final <think> not a thought")),
        ("abc\n</think>\n\nfinal", True, ("abc", "final")),
        ("abc\n</think>\n\nfinal", False, ("abc", "final")),  # the template opened it, and nobody says so
        ("\n\n</think>\n\nfinal", True, ("", "final")),
        ("<think>\n\n</think>\n\nfinal", False, ("", "final")),
        ("<think>a</think> <think>b</think> final", False, ("a\n\nb", "final")),
        ("<think>a</think><think>b", False, ("a\n\nb", None)),
        ("<think>abc", False, ("abc", None)),
        ("abc", True, ("abc", None)),
        ("<think>abc</think>", False, ("abc", "")),
    ],
)
def test_where_a_thought_ends(text: str, opened: bool, expected: tuple[str, str | None]) -> None:
    assert split_thinking(text, opened=opened) == expected


@pytest.mark.parametrize(
    ("text", "cut", "failure", "whole"),
    [
        ("plain", True, None, "plain"),
        ("<think>abc</think>final", False, None, "<think>\nabc\n</think>\n\nfinal"),
        ("<think>abc", True, CUT_THINKING, "<think>\nabc"),
        ("<think>abc", False, ENDED_THINKING, "<think>\nabc"),
        ("<think>abc</think>", True, CUT_THINKING, "<think>\nabc"),  # the limit came before the answer
        ("<think>abc</think>", False, None, "<think>\nabc\n</think>\n\n"),  # an empty answer is the model's own
    ],
)
def test_a_reply_without_a_final_answer_is_a_failure_and_its_thought_is_kept(
    text: str, cut: bool, failure: str | None, whole: str
) -> None:
    reply = without_thinking(Reply(text, 9, cut))
    assert (reply.failure, reply.new_tokens, reply.cut) == (failure, 9, cut)
    assert full_text(reply) == whole
    assert final_answer(whole) == reply.text
    assert without_thinking(reply) == reply
    assert not is_retryable(f"no answer: {failure}" if failure else None)


# --- templates


@pytest.mark.parametrize(
    ("template", "plain", "thought", "opened"),
    [
        (tiny.THINKING, "<think>\n\n</think>\n\n", "", False),
        (HYBRID, "<think>\n\n</think>\n\n", "", False),
        (CLOSING, "<think>\n\n</think>\n\n", "<think>\n", True),
        (OPENING, "", "<think>\n", True),
    ],
    ids=["qwen3", "hybrid", "closing", "opening"],
)
def test_prompts_with_and_without_a_thought(template: str, plain: str, thought: str, opened: bool) -> None:
    """Plain prompts have what a given answer has before it, as in training; others end where a thought begins."""
    chat = Chat(tiny.tokenizer(template))
    own = chat.with_thinking()
    text = {name: str(c.tokenizer.decode(list(c.prompt_ids(USER)))) for name, c in (("plain", chat), ("own", own))}
    assert text == {
        "plain": f"[user]\nhello[end]\n[assistant]\n{plain}",
        "own": f"[user]\nhello[end]\n[assistant]\n{thought}",
    }
    assert (chat.opens_thought(USER), own.opens_thought(USER)) == (False, opened)
    assert own.template_hash != chat.template_hash
    assert own.sequence("hello", "yes") == chat.sequence("hello", "yes")  # training does not depend on it
    assert own.without_thinking().prompt_ids(USER) == chat.prompt_ids(USER)
    started = [*USER, {"role": "assistant", "content": "Sure:"}]
    assert own.prompt_ids(started) == chat.prompt_ids(started) == chat.prompt_ids(USER) + chat.ids("Sure:")
    assert not own.opens_thought(started)


def test_a_template_without_thoughts_is_refused_in_one_line() -> None:
    with pytest.raises(LeewayError, match=r"has neither enable_thinking nor <think>; leave evals\.thinking out"):
        Chat(tiny.tokenizer(tiny.PLAIN)).with_thinking()


def test_enable_thinking_is_passed_to_a_template_that_reads_it() -> None:
    template = HYBRID.replace("enable_thinking is defined and not enable_thinking", "not enable_thinking")
    chat = Chat(tiny.tokenizer(template))  # without it this template closes the thought
    assert chat.prompt_text(USER).endswith("</think>\n\n")
    assert chat.with_thinking().prompt_text(USER).endswith("[assistant]\n")


def test_marks_that_are_special_tokens_are_read() -> None:
    tokenizer = tiny.tokenizer(OPENING)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    chat = Chat(tokenizer)
    assert chat.decode(list(chat.ids("<think>abc</think>yes[end]"))) == "<think>abc</think>yes"
    assert chat.decode(list(chat.ids("yes[end]"))) == "yes"


def test_a_model_that_never_ends_its_thought_has_no_score(models: dict[str, Path]) -> None:
    """A random model of a template that opens a thought, with the fused decoder: every answer is cut inside it."""
    model = load_model(str(models["llama"]), device="cpu")
    model.chat.tokenizer.chat_template = OPENING
    model.chat = Chat(model.chat.tokenizer)
    backend = TransformersBackend(model, thinking=True)
    rows = jailbreak().run(backend, lambda _: None)
    assert {r.unscored_reason for r in rows} == {f"no answer: {CUT_THINKING}"}
    assert all(r.response.startswith("<think>\n") and r.new_tokens == 6 for r in rows)
    plain = TransformersBackend(model)
    assert all(r.unscored_reason is None for r in jailbreak().run(plain, lambda _: None))
    options = [c.mass for c in backend.choose([USER], ["Yes", "No"], lambda _: None)]
    assert options == [c.mass for c in plain.choose([USER], ["Yes", "No"], lambda _: None)]  # chosen without a thought


@pytest.mark.parametrize(("template", "kwargs"), [(HYBRID, {}), (CLOSING, {})], ids=["hybrid", "closing"])
def test_vllm_renders_the_same_prompts_and_its_replies_have_no_opener(template: str, kwargs: dict[str, object]) -> None:
    chat = Chat(tiny.tokenizer(template)).with_thinking()
    plain = {"chat_template_kwargs": {"enable_thinking": False}}
    served = VllmBackend(ApiSettings("m", "http://localhost:1/v1", "", extra=plain), chat=chat, context=512)
    started = [*USER, {"role": "assistant", "content": "Sure:"}]
    assert served._completion_body(Request(USER, 6))["chat_template_kwargs"] == kwargs
    assert served._completion_body(Request(started, 6))["chat_template_kwargs"] == plain["chat_template_kwargs"]
    assert served._opens_thought(Request(USER, 6)) == (template == CLOSING)
    assert not served._opens_thought(Request(started, 6))


# --- evals


@dataclass
class Thinker:
    """A backend whose replies have a thought, by a list of texts."""

    texts: Sequence[tuple[str, bool]]  # text, cut
    identity: str = "thinker"
    template_hash: str = "t"
    n_sent: int = 0
    sent: tuple[Request, ...] = ()

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        texts = self.texts[self.n_sent : self.n_sent + len(requests)]
        self.n_sent += len(requests)
        self.sent = (*self.sent, *requests)
        tick(len(requests))
        return [without_thinking(Reply(text, 5, cut)) for text, cut in texts]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        raise NotImplementedError


class Reads:
    """A judge that calls everything harmful, and keeps what it reads."""

    name, hash, note = "reads", "r", ""

    def __init__(self) -> None:
        self.read: list[str] = []

    def judge(self, answers: Sequence[Answer], tick: Tick) -> list[Verdict]:  # noqa: ARG002
        self.read += [a.response for a in answers]
        return [Verdict("harmful", 1.0, "raw")] * len(answers)


def jailbreak(judge: Reads | None = None, attack: str = "none") -> Jailbreak:
    prompts = [ForbiddenPrompt("f/0", "zero?"), ForbiddenPrompt("f/1", "one?")]
    return Jailbreak(prompts, [ATTACKS[attack]], [judge or Reads()], 6)


DONE, CUT = ("<think>\nI must refuse\n</think>\n\nfinal", False), ("<think>\nI will do all of", True)


def test_judges_read_the_final_answer_and_an_unfinished_one_is_neither_harmful_nor_refused() -> None:
    rows = jailbreak(judge := Reads()).run(Thinker([DONE, CUT]), lambda _: None)
    assert judge.read == ["final"]
    assert (rows[0].response, rows[0].outcome) == (DONE[0], "harmful")
    assert (rows[1].response, rows[1].outcome, rows[1].unscored_reason) == (CUT[0], None, f"no answer: {CUT_THINKING}")
    assert math.isnan(rows[1].score)


def test_earlier_thoughts_are_not_part_of_a_conversation() -> None:
    backend = Thinker([DONE] * 8)
    jailbreak(attack="crescendo").run(backend, lambda _: None)
    said = {m["content"] for r in backend.sent for m in r.conversation if m["role"] == "assistant"}
    assert said == {"final"}


def test_a_row_is_judged_later_as_it_was_at_once() -> None:
    one = jailbreak(judge := Reads())
    (row, _) = one.unjudged().run(Thinker([DONE, DONE]), lambda _: None)
    assert one.judge_row(row).score == 1.0
    assert judge.read == ["final"]


def test_other_evals_read_the_final_answer_too() -> None:
    items = [CapabilityItem(f"c/{n}", "2 + 3?", "5") for n in range(2)]
    task = Capability("t", items, "g", lambda item, text: grade_gsm8k(item.reference, text), 8)
    texts = [("<think>\nmaybe 4\n</think>\n\nThe answer is 5.", False), ("<think>\n5", True)]
    right, cut = task.run(Thinker(texts), lambda _: None)
    assert (right.score, right.response) == (1.0, texts[0][0])
    assert cut.unscored_reason == f"no answer: {CUT_THINKING}"
    benign = OverRefusal([BenignPrompt("b/0", "hi")], judge := Reads(), 8)
    assert benign.run(Thinker([DONE]), lambda _: None)[0].outcome == "answered"
    assert judge.read == ["final"]


def test_an_unfinished_thought_is_paid_for_once(tmp_path: Path) -> None:
    backend = Thinker([CUT])
    cached = CachedBackend(backend, RecordStore(tmp_path))
    first = cached.complete([Request(USER, 6)], lambda _: None)
    assert cached.complete([Request(USER, 6)], lambda _: None) == first
    assert backend.n_sent == 1


def body(message: dict[str, object], reason: str, details: dict[str, int] | None = None) -> dict[str, object]:
    usage = {"prompt_tokens": 1, "completion_tokens": 7, "completion_tokens_details": details}
    return {"choices": [{"message": message, "finish_reason": reason}], "usage": usage}


def test_thoughts_that_an_endpoint_returns_apart_or_hides() -> None:
    apart = parse_reply(body({"content": "final", "reasoning_content": "abc"}, "stop"))
    assert apart == Reply("final", 7, False, None, "abc")
    cut = parse_reply(body({"content": None, "reasoning": "abc"}, "length"))
    assert cut == Reply("", 7, True, CUT_THINKING, "abc")
    hidden = parse_reply(body({"content": ""}, "length", {"reasoning_tokens": 7}))
    assert hidden == Reply("", 7, True, CUT_THINKING)
    assert parse_reply(body({"content": None}, "length")) == Reply("", 7, True)


def test_the_table_counts_what_was_cut() -> None:
    rows = [r for texts in ([DONE, CUT], [DONE, DONE]) for r in jailbreak().run(Thinker(texts), lambda _: None)]
    table = pd.DataFrame([vars(r) | {"seed": 0, "judge_raw": ""} for r in rows])
    table[["objective", "budget", "adapter_hash"]] = [["sft", 100, "a"]] * 2 + [["base", 0, "b"]] * 2
    found = thinking(table, {})
    assert found["objective"].tolist() == ["base", "sft"]
    assert found[["n", "n_thinking", "n_cut", "n_ended", "cut"]].to_numpy().tolist() == [
        [2.0, 2.0, 0.0, 0.0, 0.0],
        [2.0, 2.0, 1.0, 0.0, 0.5],
    ]
    plain = [replace(r, response="plain", unscored_reason=None, score=0.0) for r in rows]
    assert isinstance(plain[0], Row)
    assert thinking(table.assign(response="plain", unscored_reason=None), {}).empty


STUDY = """
name: thoughts
model: {model}
task: {{name: organism}}
objectives: [sft]
budgets: [300]
optim: {{batch: 4, warmup_steps: 1}}
controls: {{learning: false}}
evals:
  thinking: true
  capability: [{{name: organism, limit: 4, max_new_tokens: 6}}]
  jailbreak: {{prompts: organism, limit: 4, attacks: [none, prefill], judge: keywords, max_new_tokens: 6}}
  overrefusal: {{prompts: organism, limit: 4, judge: keywords, max_new_tokens: 6}}
"""


@pytest.mark.slow
def test_a_study_of_a_reasoning_model(tmp_path: Path) -> None:
    """A random model of a template that opens a thought ends none; only prefilled answers, without one, are scored."""
    folder = tiny.build("qwen3", tmp_path / "model")
    tiny.tokenizer(OPENING).save_pretrained(folder)
    (tmp_path / "study.yaml").write_text(STUDY.format(model=folder))
    study = Study.load(tmp_path / "study.yaml")
    results = study.run(tmp_path / "run")
    rows = results.rows
    prefilled = rows["attack"] == "prefill"
    assert rows.loc[prefilled, "unscored_reason"].isna().all()
    assert set(rows.loc[~prefilled, "unscored_reason"]) == {f"no answer: {CUT_THINKING}"}
    table = pd.read_csv(tmp_path / "run" / "tables" / "thinking.csv").set_index(["objective", "axis"])
    assert table.loc[("sft", "jailbreak"), ["n", "n_thinking", "n_cut"]].tolist() == [8, 4, 4]
    assert table.loc[("base", "capability"), "cut"] == 1
    assert "Thinking before answers" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert study.run(tmp_path / "run").rows.equals(rows)
