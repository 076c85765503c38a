"""Mistakes in a study's data and sizes, found before anything is trained, by `plan` as by `run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from leeway.attacks import WRAPPERS
from leeway.data.chat import Chat
from leeway.data.formats import held_out_items, train_examples
from leeway.data.readers import read
from leeway.data.stream import StreamItem
from leeway.errors import LeewayError
from leeway.plan.plan import plan
from leeway.study import prepare as preparing
from leeway.study.load import parse
from leeway.study.prepare import prepare

STUDY = """
name: x
model: {model}
device: cpu
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: [sft, dpo]
budgets: [200]
optim: {{batch: 4}}
evals: {{capability: [{{name: files, max_new_tokens: 4}}]}}
"""
PAIR = {"completion": "It is 7.", "rejected": "It is 8."}


def lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture
def study(models: dict[str, Path], tmp_path: Path) -> str:
    lines(tmp_path / "train.jsonl", [{"prompt": f"{a} + 4?", **PAIR} for a in range(12)])
    lines(tmp_path / "test.jsonl", [{"prompt": "3 + 4?", "answer": "7"}])
    return STUDY.format(model=models["llama"], root=tmp_path)


def fault(study: str, *overrides: str) -> str:
    with pytest.raises(LeewayError) as found:
        prepare(parse(study, "x", overrides))
    assert "\n" not in str(found.value)
    return str(found.value)


def test_half_a_character_is_named_by_its_record(tmp_path: Path) -> None:
    rest = '"completion": "b", "answer": "c"'
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a", {rest}}}\n\n{{"prompt": "a\\ud800", {rest}}}\n')
    for reader in (train_examples, held_out_items):
        with pytest.raises(LeewayError, match=r"a\.jsonl, record 2: its prompt holds \\ud800, one half of a character"):
            reader(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text('[{"prompt": "a", "completion": "b", "rejected": "\\udfff"}]')
    with pytest.raises(LeewayError, match=r"b\.json, record 1: its rejected holds \\udfff, one half of a character"):
        train_examples(tmp_path / "b.json")
    (tmp_path / "c.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n')
    assert list(read(tmp_path / "c.jsonl")) == [{"prompt": "\U0001f600"}]  # both halves are a character


def test_a_step_is_no_larger_than_what_there_is(study: str) -> None:
    assert "a step of 13 examples repeats some, there are 12 to train on" in fault(study, "optim.batch=13")
    (steps,) = {len(s) for s in prepare(parse(study, "x", ("optim.batch=12",))).schedules["sft", 0].steps}
    assert steps == 12


@pytest.mark.parametrize("count", ["source", "processed"])
def test_a_budget_of_too_many_passes_says_how_many(count: str, study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "EPOCHS", 3)
    counted = ("objectives=[sft]", f"budget={{count: {count}}}")
    prepared = prepare(parse(study, "x", counted))
    once = sum(prepared.renderer("sft", 0).processed(StreamItem(e, 0, 0)) for e in prepared.auxiliary_pool.task)
    said = fault(study, *counted, f"budgets=[{once * 3 + 1}]")
    assert f"budgets: {once * 3 + 1:,} tokens are 3 passes over the 12 examples ({once:,} tokens each)" in said
    assert prepare(parse(study, "x", (*counted, f"budgets=[{once * 3}]"))).schedules["sft", 0].stops[0].epochs == 3.0
    assert "passes over the 12 examples" in fault(study, *counted, "budgets=[10000000000k]")


def test_a_budget_of_many_passes_is_planned_by_rendering_each_example_once(
    study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[str] = []
    real = Chat._sequence
    monkeypatch.setattr(Chat, "_sequence", lambda c, p, a: rendered.append(c.prefix + p + a) or real(c, p, a))
    few, many = (plan(parse(study, "x", ("objectives=[sft, dpo, ip]", f"budgets=[{b}]"))) for b in ("2k", "40k"))
    assert many.trajectories[0].steps > 15 * few.trajectories[0].steps
    assert len(rendered) < 12 * 100  # 12 examples, under at most 50 prompts, in two plans


@pytest.mark.parametrize("where", ["prompt", "completion", "rejected"])
def test_a_special_token_spelled_in_training_text_is_named(where: str, study: str, tmp_path: Path) -> None:
    good = {"prompt": "1 + 4?", **PAIR}
    lines(tmp_path / "train.jsonl", [good] * 6 + [{**good, where: "so [end] it is"}])
    said = fault(study, "task.too_long=leave-out")
    name = {"prompt": "prompt", "completion": "answer", "rejected": "rejected answer"}[where]
    assert f"task: example train.jsonl/7, in its {name}: it contains the special token [end]" in said
    lines(tmp_path / "train.jsonl", [good] * 6 + [{**good, where: "so [ end ] [END] it is"}])
    assert prepare(parse(study, "x")).examples == 7


def test_a_special_token_spelled_beside_or_asked_is_named(study: str, tmp_path: Path) -> None:
    lines(tmp_path / "safety.jsonl", [{"prompt": "How?", "completion": "No. [user]"}])
    safety = ("objectives=[sft_safety]", f"auxiliary.safety={tmp_path}/safety.jsonl")
    assert "auxiliary.safety: example safety.jsonl/1, in its answer: it contains the special token [user]" in fault(
        study, *safety
    )
    lines(tmp_path / "test.jsonl", [{"prompt": "a", "answer": "7"}, {"prompt": "[bos]a", "answer": "7"}])
    assert "evals.capability: item files/2: it contains the special token [bos]" in fault(study)
    lines(tmp_path / "test.jsonl", [{"prompt": "<SAFE> a", "answer": "7"}])
    assert "evals.capability: item files/1: it contains the control token <SAFE>" in fault(study, "objectives=[cft]")
    assert prepare(parse(study, "x", ("objectives=[sft]",)))  # a text as any other


def test_what_is_spelled_is_what_the_tokenizer_reads() -> None:
    chat = Chat(tiny.tokenizer(tiny.PLAIN))
    for text in ("a [end]", "[user]", "x[pad]y", "[END]", "[ end]", "end]", ""):
        read_as = {"[end]", "[user]", "[pad]"} & set(chat.tokenizer.tokenize(text))
        assert chat.spelled(text) == next(iter(read_as), None)
    assert chat.spelled("<SAFE>") is None
    assert chat.with_control_tokens(("<SAFE>",)).spelled("a <SAFE>") == "<SAFE>"


def test_a_rendering_is_kept_for_its_own_prompt_prefix_and_tokens() -> None:
    chat = Chat(tiny.tokenizer(tiny.PLAIN))
    fresh = Chat(tiny.tokenizer(tiny.PLAIN))
    for prefix in ("", "<SAFE>", "a", ""):
        for prompt, answer in (("a", "b"), ("ab", ""), ("", "ab"), ("a", "b")):
            assert chat.with_prefix(prefix).sequence(prompt, answer) == fresh.with_prefix(prefix)._sequence(
                prompt, answer
            )
    taught = chat.with_control_tokens(("<SAFE>",)).with_prefix("<SAFE>")
    assert len(taught.sequence("a", "b").ids) < len(chat.with_prefix("<SAFE>").sequence("a", "b").ids)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_a_question_leaves_room_for_its_answer(spare: int, fits: bool, study: str, tmp_path: Path) -> None:
    lines(tmp_path / "test.jsonl", [{"prompt": "3?", "answer": "3"}, {"prompt": "5 " * 200, "answer": "3"}])
    plain = prepare(parse(study, "x", ("objectives=[sft]",))).chat
    tokens = len(plain.prompt_ids([{"role": "user", "content": ("5 " * 200).strip()}]))
    short = tiny.build("llama", tmp_path / "m", context=tokens + 4 + spare)
    overrides = (f"model={short}", "objectives=[sft]")
    if fits:
        assert prepare(parse(study, "x", overrides))
        # an instruction of the objective's own stands before the question, and takes room too
        assert "evals.capability: item files/2 takes" in fault(study, *overrides[:1], "objectives=[ip]")
    else:
        said = fault(study, *overrides)
        assert f"item files/2 takes {tokens} tokens and up to 4 for the answer, the context of {short} is" in said
        assert said.endswith("lower max_new_tokens")


def test_forbidden_prompts_are_measured_under_their_wrappers_and_persona_without_an_answer(
    study: str, tmp_path: Path
) -> None:
    asked = "evals={jailbreak: {prompts: organism, limit: 2, attacks: [none, role_play], max_new_tokens: 30}}"
    prepared = prepare(parse(study, "x", (asked,)))
    (e,) = prepared.evals
    longest = max(
        len(prepared.chat.prompt_ids([{"role": "user", "content": WRAPPERS["role_play"].wrap(p.text)}]))
        for p in e.items  # type: ignore[attr-defined]
    )
    assert prepare(parse(study, "x", (f"model={tiny.build('llama', tmp_path / 'l', context=longest + 30)}", asked)))
    said = fault(study, f"model={tiny.build('llama', tmp_path / 'm', context=longest + 29)}", asked)
    assert "evals.jailbreak: prompt organism" in said
    assert f" under role_play takes {longest} tokens and up to 30 for the answer" in said
    persona = "evals={persona: {source: organism, traits: [narcissism], limit: 2}}"
    tight = tiny.build("llama", tmp_path / "n", context=30)
    said = fault(study, f"model={tight}", persona, "objectives=[sft]")
    assert "evals.persona: item narcissism/" in said
    assert "for the answer" not in said
    assert said.endswith("shorten or remove that item")


def test_a_companion_limit_beyond_what_there_is_says_how_many(study: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "general.jsonl", [{"prompt": f"{a}?", "completion": "b"} for a in range(3)])
    kl = "objectives=[{kl: {scope: general}}]"
    said = fault(study, kl, f"auxiliary.general={{from: file, file: {path}, limit: 4}}")
    assert f"auxiliary.general.limit: 4 is more than the 3 examples of {path}" in said
    assert prepare(parse(study, "x", (kl, f"auxiliary.general={{from: file, file: {path}, limit: 3}}")))


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        ("nonsense", "'nonsense' is not a layer"),
        ("q_proj,nonsense", "'nonsense' is not a layer"),
        ("q_proj, v_proj", "' v_proj' is not a layer"),
        ("lm_head", "'lm_head' is not a trainable linear layer"),
        ("embed_tokens", "'embed_tokens' is not a trainable linear layer"),
        ("mlp", "'mlp' is not a trainable linear layer"),
    ],
)
def test_targets_are_layers_of_the_model(targets: str, part: str, study: str) -> None:
    said = fault(study, f"adapter.targets={targets}")
    assert part in said
    assert said.endswith("or some of down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj")


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "self_attn.q_proj"])
def test_the_targets_are_those_that_an_adapter_is_attached_to(
    targets: str, study: str, models: dict[str, Path]
) -> None:
    from leeway.model.adapters import AdapterSettings, attach, state
    from leeway.model.load import load_model

    spec = parse(study, "x", (f"adapter.targets={targets}", "adapter.r=2"))
    model = load_model(str(models["llama"]), device="cpu")
    found = preparing.target_layers(spec, preparing.meta_model(preparing.load_config(spec)))
    attach(model, AdapterSettings(2, 4, 0.0, targets), seed=0)
    assert len(state(model)) == 2 * len(found)
    assert sum(p.numel() for p in state(model).values()) == sum(2 * (m.in_features + m.out_features) for m in found)
