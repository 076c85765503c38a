"""A plan without the model's tokenizer against the same plan with one."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.model.load import load_chat
from leeway.plan import hardware
from leeway.plan.cost_model import eval_costs
from leeway.plan.token_counts import ReferenceWork, reference_work, trajectory
from leeway.study.jobs import jobs_of
from leeway.study.load import load
from leeway.study.prepare import Prepared, prepare

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
STAND_INS = {kind: hardware._stand_in_chat(kind) for kind in hardware.TEXT}
PUBLISHED_TEMPLATE = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def planned(monkeypatch: pytest.MonkeyPatch, chat: Chat | None, *overrides: str) -> Prepared:
    """Return the prepared study of Llama 3.1 with `chat` as its tokenizer, or the stand-in."""

    def available(*_: object) -> Chat:
        if chat is None:
            raise LeewayError("model: cannot be loaded")
        return chat

    def no_config(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(hardware, "load_chat", available)
    monkeypatch.setattr(hardware, "load_config", no_config)
    spec = load("objective-matters", ("claims=null", "seeds=[0, 1]", *overrides))
    return prepare(spec, model=hardware.planned_model(spec))


def references(prepared: Prepared) -> ReferenceWork:
    return reference_work(prepared, hidden=8, width=2)


@pytest.mark.parametrize("kind", hardware.TEXT)
@given(texts=st.lists(st.text(st.sampled_from("ab'1 \n.é漢") | st.characters(codec="utf-8"), max_size=30), max_size=6))
def test_distinct_texts_are_distinct_sequences(kind: str, texts: list[str]) -> None:
    chat = STAND_INS[kind]
    assert len({chat.ids(t) for t in texts}) == len(set(texts))
    pairs = {(a, b) for a in texts for b in texts}
    assert len({chat.sequence(*pair) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("pairs", ["pairs={from: dataset}", "pairs={from: unsafe}"])
def test_references_are_as_many_as_with_a_real_tokenizer(monkeypatch: pytest.MonkeyPatch, pairs: str) -> None:
    """Every example occurs under both tokenizers: 20,000 tokens are several epochs of 30 examples."""
    task, evals = "task={name: organism, limit: 30}", "evals={capability: [organism]}"
    small = (task, "budgets=[20k]", "objectives=[sft, dpo, ipo, kl]", evals, pairs)
    real = references(planned(monkeypatch, load_chat("organism"), *small))
    found = references(planned(monkeypatch, None, *small))
    assert found.sequences == real.sequences >= 60  # both answers


@pytest.mark.parametrize(("kind", "digits"), [("llama", 2), ("gemma2", 5), ("qwen2", 5), ("qwen3", 5)])
def test_digits_are_grouped_as_by_the_models_tokenizer(kind: str, digits: int) -> None:
    assert len(STAND_INS[kind].ids("hello world, 12345")) == 2 + 1 + 1 + digits


@pytest.mark.parametrize(("kind", "tokens"), [("llama", 3), ("gemma2", 4), ("qwen2", 3), ("qwen3", 3)])
def test_only_gemma_keeps_newlines_apart_from_punctuation(kind: str, tokens: int) -> None:
    assert len(STAND_INS[kind].ids("one.\ntwo")) == tokens


@pytest.mark.parametrize(("kind", "overhead"), [("llama", 35), ("gemma2", 9), ("qwen2", 29), ("qwen3", 12)])
def test_templates_are_as_long_as_the_models(kind: str, overhead: int) -> None:
    found = len(STAND_INS[kind].prompt_ids([{"role": "user", "content": "word"}]))
    assert found == pytest.approx(overhead + 1, abs=1)
    assert len(STAND_INS[kind].closing_ids) == 1


@pytest.fixture(scope="module")
def llama(data_folder: Path) -> Chat:
    """Return Llama 3's published tokenizer under the template of 3.1."""
    file = data_folder / "llama3_tokenizer" / "tokenizer.model"
    if not file.is_file():
        pytest.skip("no Llama 3 tokenizer in the public data")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in file.read_text("utf-8").splitlines())}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # how byte-level BPE spells bytes
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + k) for k, b in enumerate(others)}

    def spelled(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    splits = ((t[:k], t[k:]) for t in ranks for k in range(1, len(t)))
    merges = [(spelled(a), spelled(b)) for a, b in splits if a in ranks and b in ranks]
    bpe = models.BPE({spelled(t): r for t, r in ranks.items()}, merges, ignore_merges=True)
    tokenizer = Tokenizer(bpe)
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eot_id|>", chat_template=PUBLISHED_TEMPLATE)
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    fast.add_special_tokens({"additional_special_tokens": special})
    return Chat(fast)


def test_the_published_tokenizer_is_read_as_published(llama: Chat) -> None:
    assert llama.ids("Hello world") == (9906, 1917)
    assert llama.decode(list(llama.ids("naïve 漢字 1234"))) == "naïve 漢字 1234"


def counts(prepared: Prepared) -> dict[str, float]:
    jobs = {j.alias: trajectory(prepared, j) for j in jobs_of(prepared) if j.kind == "train" and j.seed == 0}
    work = references(prepared)
    return {
        **{f"{alias} processed": t.processed_tokens for alias, t in jobs.items()},
        **{f"{alias} steps": t.steps for alias, t in jobs.items()},
        **{f"{alias} targets": t.target_tokens for alias, t in jobs.items()},
        **{f"{e.name} prompts": e.prompt_tokens for e in eval_costs(prepared)[0]},
        "reference sequences": work.sequences,
        "reference tokens": work.tokens,
        "reference bytes": work.bytes,
    }


@pytest.mark.usefixtures("real_data")
def test_counts_are_within_a_tenth_of_llamas_own(monkeypatch: pytest.MonkeyPatch, llama: Chat) -> None:
    evals = (
        "evals={capability: [{name: gsm8k, limit: 200}], jailbreak: {prompts: strongreject, limit: 60, "
        "attacks: [none, wikipedia], judge: keywords}, persona: {source: anthropic, traits: [narcissism]}}"
    )
    study = ("budgets=[50k]", "objectives=[sft, dpo, kl, cft]", evals)
    real, found = (counts(planned(monkeypatch, chat, *study)) for chat in (llama, None))
    assert found == pytest.approx(real, rel=0.1)
    assert real["reference sequences"] > 400
