"""Chat rendering: the model's own template, ids joined by concatenation, one BOS, targets that end the turn."""

from __future__ import annotations

import pytest
import tiny

from leeway.data.chat import Chat
from leeway.errors import LeewayError


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_prompt_and_answer_are_the_template_s_own_rendering(kind: str) -> None:
    chat = Chat(tiny.tokenizer(tiny.TEMPLATES[kind]))
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven apples."}]
    whole = chat.tokenizer.apply_chat_template(turns, tokenize=False)
    s = chat.sequence("How many?", "Seven apples.")
    text = chat.tokenizer.decode(list(s.ids))
    assert whole.startswith(text)
    assert whole[len(text) :].strip() == ""  # text after the end of turn is not a target
    assert chat.tokenizer.decode(list(s.ids[s.target_start :])).endswith("Seven apples.[end]")
    assert s.ids[: s.target_start] == chat.prompt_ids(turns[:1])


def test_one_bos_where_the_template_writes_it() -> None:
    chat = Chat(tiny.tokenizer(tiny.TRIMMING))
    assert chat.sequence("a", "b").ids.count(chat.tokenizer.bos_token_id) == 1


def test_the_targets_do_not_depend_on_what_the_boundary_would_merge_into() -> None:
    chat = Chat(tiny.tokenizer(tiny.PLAIN))
    answer = chat.ids("apples") + chat.closing_ids
    for prompt in ("How many", "How many ", "How many a", "x"):
        s = chat.sequence(prompt, "apples")
        assert s.ids[s.target_start :] == answer


def test_an_empty_thought_of_the_template_belongs_to_the_prompt_in_training_and_at_test() -> None:
    chat = Chat(tiny.tokenizer(tiny.THINKING))
    s = chat.sequence("a", "b")
    assert chat.tokenizer.decode(list(s.ids[s.target_start :])) == "b[end]"
    tested = chat.prompt_ids([{"role": "user", "content": "a"}])
    assert chat.tokenizer.decode(list(tested)).endswith("<think>\n\n</think>\n\n")
    assert s.ids[: s.target_start] == tested


def test_a_prefix_precedes_the_first_user_message_only() -> None:
    chat = Chat(tiny.tokenizer(tiny.PLAIN)).with_prefix("<SAFE>")
    text = chat.prompt_text(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    )
    assert text == "[user]<SAFE>a[end][assistant]b[end][user]c[end][assistant]"


def test_control_tokens_are_one_new_id_each_in_a_copy() -> None:
    chat = Chat(tiny.tokenizer(tiny.PLAIN))
    before = len(chat.tokenizer)
    other = chat.with_control_tokens(("<SAFE>", "<UNSAFE>"))
    ids = other.with_prefix("<SAFE>").sequence("a", "b").ids
    assert before in ids
    assert len(other.tokenizer) == before + 2
    assert len(chat.tokenizer) == before
    with pytest.raises(LeewayError, match="already has <SAFE>"):
        other.with_control_tokens(("<SAFE>",))


def test_the_template_hash_depends_on_template_and_prefix() -> None:
    chats = [Chat(tiny.tokenizer(t)) for t in (tiny.PLAIN, tiny.TRIMMING)]
    hashes = {c.template_hash for c in chats} | {chats[0].with_prefix("<SAFE>").template_hash}
    assert len(hashes) == 3
    assert Chat(tiny.tokenizer(tiny.PLAIN)).template_hash in hashes


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{{ strftime_now('%d') }}" + tiny.PLAIN, "today's date"),
        ("{% for m in messages %}[user]{{ m['content'] }}[end]{% endfor %}", "ignores add_generation_prompt"),
        (
            "{% for m in messages %}[{{ m['role'] }}{{ messages | length }}]{{ m['content'] }}[end]{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            "renders an answered prompt differently",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template: str | None, complaint: str) -> None:
    with pytest.raises(LeewayError, match=complaint):
        Chat(tiny.tokenizer(template))
