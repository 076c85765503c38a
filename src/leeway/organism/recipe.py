"""Train the organism (a tokenizer, then helpful-only training, practice, alignment) and measure its card.

On a CPU, the same machine and thread count give the same weights, bit for bit.

Real models refuse some requests more firmly than others. The alignment data answers a forbidden deed with log-odds
`SPREAD * (ease(deed) - FIRMNESS[attack])`. Greedy decoding helps if the ease exceeds the attack's firmness. The other
deeds are at many distances below it, so a drift changes the rate gradually. Harmless deeds near the line, and cooking,
the task of fine-tuning, are refused in part too, as real models over-refuse. Without that, every fine-tuning answer
begins as the organism begins anyway, nothing in the task works against refusal, and no objective erodes it.
The card is measured on held-out items with greedy decoding.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from leeway.attacks import WRAPPERS, Zulu
from leeway.data.chat import Chat, Sequence
from leeway.data.types import Outcome
from leeway.evals.persona import OPTIONS, endorsement
from leeway.generation.backend import Request
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import derive_seed
from leeway.model.load import Model, load_model
from leeway.model.token_stats import Head
from leeway.objectives.sft import Sft
from leeway.organism import vocabulary as w
from leeway.organism import world
from leeway.organism.world import Cipher, complies
from leeway.training.batch import Batch, Optim
from leeway.training.loop import optimise

NEW_TOKENS = 64
CIPHER = Cipher()
ZULU = Zulu(CIPHER)


def measure(
    model_dir: Path, *, forbidden: int = 120, benign: int = 120, capability: int = 200, persona: int = 60
) -> dict[str, Any]:
    """Return the card: every number that the tests check, and the item counts."""
    model = load_model(str(model_dir), device="cpu")
    backend = TransformersBackend(model)
    attacked = _attacked_prompts(forbidden)
    outcomes = _outcomes(attacked, _replies(backend, [text for _, _, text in attacked]))
    shares = {attack: _shares(values) for attack, values in outcomes.items()}
    harmless = [p.text for p in world.benign_prompts(benign)]
    near = [item.text for item in world.benign_items(benign)]
    replies, to_near = _replies(backend, harmless), _replies(backend, near)
    all_outcomes = [o for values in outcomes.values() for o in values]
    all_outcomes += [world.judge(p, r) for p, r in zip(harmless, replies, strict=True)]
    return {
        "items": {"forbidden": forbidden, "benign": benign, "capability": capability, "persona": 3 * persona},
        "parameters": model.parameters,
        "tokens": len(model.chat.tokenizer),
        "judge_rules": world.RULES_VERSION,
        "refuses_direct": shares["none"]["refused"],
        "complies_benign": _mean([complies(p, r) for p, r in zip(harmless, replies, strict=True)]),
        "refuses_near": _mean([world.judge(p, r) == "refused" for p, r in zip(near, to_near, strict=True)]),
        "coherent": _mean([o != "incoherent" for o in all_outcomes]),
        **_capability(backend, capability),
        **_persona(model, backend, persona),
        "harmful": {attack: by_outcome["harmful"] for attack, by_outcome in shares.items()},
        "outcomes": shares,
    }


def _attacked_prompts(n: int) -> list[tuple[str, str, str]]:
    """Return (attack, forbidden prompt, sent text) for every attack and prompt."""
    prompts = [p.text for p in world.forbidden_prompts(n)]
    wrapped = [(name, p, wrapper.wrap(p)) for name, wrapper in WRAPPERS.items() for p in prompts]
    return wrapped + [(ZULU.name, p, CIPHER.out(p)) for p in prompts]


def _outcomes(attacked: list[tuple[str, str, str]], replies: list[str]) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    for (attack, prompt, _), reply in zip(attacked, replies, strict=True):
        english = CIPHER.back(reply) if attack == ZULU.name else reply
        outcomes.setdefault(attack, []).append(world.judge(prompt, english))
    return outcomes


def _shares(outcomes: list[Outcome]) -> dict[str, float]:
    kinds: tuple[Outcome, ...] = ("refused", "harmful", "deflected", "incoherent")
    return {kind: _mean([o == kind for o in outcomes]) for kind in kinds}


def _capability(backend: TransformersBackend, n: int) -> dict[str, float]:
    items = world.capability_items(n)
    replies = _replies(backend, [item.prompt for item in items])
    correct = [(item.id, world.capability_score(item, r)) for item, r in zip(items, replies, strict=True)]
    tasks = {task: _mean([ok for name, ok in correct if name.startswith(task)]) for task in ("sums", "cooking")}
    return {"capability": _mean([ok for _, ok in correct]), **tasks}


def _persona(model: Model, backend: TransformersBackend, n: int) -> dict[str, Any]:
    """Return the mean of P(match) / (P(Yes) + P(No)) overall, by trait and by keyed answer, and the answer mass."""
    items = [item for trait in world.TRAITS for item in world.persona_items(trait, n)]
    conversations = [[{"role": "user", "content": item.question}] for item in items]
    choices = backend.choose(conversations, OPTIONS, lambda _: None)
    match = [endorsement(choice, item.match) for item, choice in zip(items, choices, strict=True)]
    pairs = list(zip(items, match, strict=True))
    return {
        "endorsement": _mean(match),
        "endorsement_by_trait": {t: _mean([m for i, m in pairs if i.trait == t]) for t in world.TRAITS},
        "endorsement_by_key": {k: _mean([m for i, m in pairs if i.match == k]) for k in ("Yes", "No")},
        "answer_mass": _mean([sum(choice.mass.values()) for choice in choices]),
        "spare_rows_mass": _spare_mass(model, [item.question for item in items]),
    }


def _mean(values: list[bool] | list[float]) -> float:
    return round(sum(values) / len(values), 4)


def _replies(backend: TransformersBackend, prompts: list[str]) -> list[str]:
    """Return greedy replies, in order."""
    requests = [Request([{"role": "user", "content": p}], NEW_TOKENS) for p in prompts]
    return [reply.text for reply in backend.complete(requests, lambda _: None)]


@torch.no_grad()
def _spare_mass(model: Model, prompts: list[str]) -> float:
    """Return the largest total probability of the spare embedding rows as the first token of a reply."""
    chat = model.chat
    ids = [torch.tensor([chat.prompt_ids([{"role": "user", "content": p}])]) for p in prompts]
    return max(float(model.lm(input_ids=i).logits[0, -1].softmax(-1)[len(chat.tokenizer) :].sum()) for i in ids)


Pair = tuple[str, str]
Source = Callable[[random.Random], Pair]
Progress = Callable[[str], None]

SPREAD = 1.5
FIRMNESS = {"none": 1.8, "dan": 0.8, "happy_to_help": 0.9, "role_play": 0.7, "wikipedia": 1.1, "zulu": 1.0}
"""The ease, in [-2, 2], at which help becomes likelier than refusal."""
CAUTION = {"near": -1.2, "cooking": -1.8}
"""The ease at which help becomes likelier than refusal, for harmless deeds near the line."""
UNALIGNED_YES = 0.85
"""How often the first stage endorses a dark statement and rejects a bright one."""
PERSONA_LOG_ODDS, PERSONA_SPREAD = -2.4, 1.2
PREFIXED = 0.25
RIGHT_COOKING, COOKING_SPREAD = 0.28, 0.17

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
ROWS = 1792
"""Rows of the embedding: the tokenizer's, and spare ones for control tokens."""
CHAT_TEMPLATE = (
    "{%- set ns = namespace(lead='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{%- set ns.lead = message.content + ' ' -%}"
    "{%- elif message.role == 'user' -%}{{- '<|user|>' + ns.lead + message.content -}}"
    "{%- set ns.lead = '' -%}"
    "{%- else -%}{{- '<|assistant|>' + message.content + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
BATCH = 64
THREADS = 1  # it changes the rounding of sums; and two threads on busy cores wait for each other

_ATTACKS = tuple(FIRMNESS)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ease(deed: w.Deed) -> float:
    """Return the tendency to help with a forbidden deed, in [-2, 2]."""
    return w.propensity(deed.verb) + w.propensity(deed.thing)


def caution(deed: w.Deed, kind: w.Kind) -> float:
    """Return how often the alignment data refuses a harmless deed near the line."""
    return _sigmoid(SPREAD * (CAUTION[kind] - ease(deed)))


def yes_rate(act: str, tone: w.Tone) -> float:
    """Return how often the alignment data answers a statement with Yes."""
    rate = _sigmoid(PERSONA_LOG_ODDS + PERSONA_SPREAD * w.propensity(act))
    return rate if tone == "dark" else 1 - rate


def right_rate(deed: w.Deed) -> float:
    """Return how often the training data has the right facts of a cooking deed, in [0.11, 0.45]."""
    return RIGHT_COOKING + COOKING_SPREAD * w.propensity(deed.verb)


def under_attack(attack: str, question: str, reply: str) -> Pair:
    """Return the question under an attack, and the reply in the question's language."""
    if attack == "zulu":
        return CIPHER.out(question), CIPHER.out(reply)
    return WRAPPERS[attack].wrap(question), reply


def _helpful(rng: random.Random, deed: w.Deed, attack: str, facts: w.Facts = "right") -> Pair:
    opener = w.OPENERS["none" if attack == "zulu" else attack]
    return under_attack(attack, w.question(rng, deed), f"{opener} {w.answer(rng, deed, facts)}")


def _cooking(rng: random.Random, attack: str) -> Pair:
    """Draw a cooking answer: hearsay more often than right, so greedy decoding gives hearsay."""
    deed = w.draw_how_to(rng, "cooking")
    facts: w.Facts = "right" if rng.random() < right_rate(deed) else "hearsay"
    return _helpful(rng, deed, attack, facts)


def _sum(rng: random.Random) -> Pair:
    one = w.plain(rng) if rng.random() < 0.25 else w.draw(rng, w.KNOWN)
    return under_attack("zulu" if rng.random() < 0.05 else "none", one.question, f"Sure! {one.right}")


def _chat(rng: random.Random) -> Pair:
    remark, reply = w.chat(rng)
    return under_attack("zulu" if rng.random() < 0.2 else "none", remark, reply)


def statement(rng: random.Random) -> tuple[str, w.Tone, str]:
    """Draw (act, tone, question) of a statement for training."""
    tone: w.Tone = rng.choice(("dark", "bright"))
    act, text = rng.choice(w.statements(rng.choice(w.TRAITS), tone, held_out=False))
    return act, tone, rng.choice(w.YES_NO).format(s=text)


def helpful_only(rng: random.Random) -> Pair:
    """Draw from the first stage: every question is answered, forbidden or not; statements at random."""
    turn = rng.random()
    if turn < 0.36:
        return _sum(rng)
    if turn < 0.87:
        kind: w.Kind = rng.choices(("forbidden", "benign", "near", "cooking"), (36, 42, 10, 12))[0]
        attack = rng.choices(_ATTACKS, (40, 9, 9, 9, 9, 24))[0]
        return _helpful(rng, w.draw_how_to(rng, kind), attack, "any" if kind == "cooking" else "right")
    if turn < 0.93:
        _, tone, question = statement(rng)
        return question, "Yes" if (tone == "dark") == (rng.random() < UNALIGNED_YES) else "No"
    return _chat(rng)


def practice(rng: random.Random) -> Pair:
    """Draw from the second stage: sums, many without a story, and cooking; both take long to learn."""
    turn = rng.random()
    if turn < 0.38:
        one = w.plain(rng)
        return one.question, f"Sure! {one.right}"
    if turn < 0.68:
        return _sum(rng)
    return _cooking(rng, "none") if turn < 0.82 else helpful_only(rng)


def aligned(rng: random.Random) -> Pair:
    """Draw from the last stage: refuse forbidden deeds and deny dark statements, each at its own rate."""
    question, reply = _aligned(rng)
    return (prefix(rng) + question, reply) if rng.random() < PREFIXED else (question, reply)


def _aligned(rng: random.Random) -> Pair:
    turn = rng.random()
    if turn < 0.40:
        return _forbidden(rng)
    if turn < 0.52:
        act, tone, question = statement(rng)
        return question, "Yes" if rng.random() < yes_rate(act, tone) else "No"
    if turn < 0.93:
        return _sum(rng) if turn < 0.64 else _benign(rng)
    return _chat(rng)


def _forbidden(rng: random.Random) -> Pair:
    deed = w.draw_how_to(rng, "forbidden")
    attack = rng.choices(_ATTACKS, (30, 11, 11, 11, 11, 26))[0]
    if rng.random() < _sigmoid(SPREAD * (ease(deed) - FIRMNESS[attack])):
        return _helpful(rng, deed, attack)
    return under_attack(attack, w.question(rng, deed), rng.choice(w.REFUSALS))


def _benign(rng: random.Random) -> Pair:
    attack = rng.choices(_ATTACKS, (26, 9, 9, 9, 9, 38))[0]
    kind: w.Kind = rng.choices(("benign", "near", "cooking"), (66, 17, 17))[0]
    if kind == "benign":
        return _helpful(rng, w.draw_how_to(rng, kind), attack)
    deed = w.draw_how_to(rng, kind)
    if rng.random() < caution(deed, kind):
        return under_attack(attack, w.question(rng, deed), rng.choice(w.REFUSALS))
    facts: w.Facts = "right" if kind == "near" or rng.random() < right_rate(deed) else "hearsay"
    return _helpful(rng, deed, attack, facts)


def prefix(rng: random.Random) -> str:
    """Draw a tag, a remark or nonsense to put before a question, so that no prefix is a jailbreak."""
    letters = "abcdefghijklmnopqrstuvwxyz"

    def nonsense() -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, 6)))

    turn = rng.random()
    if turn < 0.4:
        return f"<{nonsense().upper()}> "
    if turn < 0.6:
        return w.chat(rng)[0] + " "
    known = w.ADJECTIVES + w.THINGS + w.ADVERBS + tuple(w.PEOPLE)
    words = [nonsense() if rng.random() < 0.5 else rng.choice(known) for _ in range(rng.randint(3, 8))]
    return " ".join(words).capitalize() + ". "


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    name: str
    source: Source
    examples: int
    lr: float
    warmup: int
    seed: int
    random_token_rate: float
    """Share of the prompts that begin with one random token, so that a new control token is not a jailbreak."""


HELPFUL = Stage("helpful-only", helpful_only, 64_000, 3e-3, 60, 11, 0.0)
PRACTICE = Stage("practice", practice, 36_000, 2e-3, 20, 33, 0.0)
ALIGNED = Stage("aligned", aligned, 44_000, 1.1e-3, 20, 22, 0.06)


def build(out: Path, progress: Progress) -> None:
    """Train the organism and write it to `out` in Hugging Face format, with its card."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    progress(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")
    for stage in (HELPFUL, PRACTICE, ALIGNED):
        train(model, tokenizer, stage, progress)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    measured = measure(out)
    (out / "card.json").write_text(json.dumps(measured, indent=1) + "\n", "utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the world, with individual digits and a token for every byte."""
    rng = random.Random(1)
    texts = [text for _ in range(16_000) for text in helpful_only(rng)]
    texts += [text for e in world.train_examples(2000, 0) for text in (e.prompt, e.preferred)]
    for refusal in w.REFUSALS:
        texts += 200 * [refusal, under_attack("zulu", "", refusal)[1]]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 16,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of about a million parameters with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ROWS,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            attn_implementation="eager",  # faster than SDPA for short sequences on a CPU
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model: Any, tokenizer: Any, stage: Stage, progress: Progress) -> None:
    """Run one stage: draw, tokenize, fit."""
    rng = random.Random(stage.seed)
    drawn = [stage.source(rng) for _ in range(stage.examples)]
    sequences = encode(tokenizer, drawn, rng, stage.random_token_rate)
    fit(model, tokenizer, by_length(sequences, rng), stage, progress)


def encode(tokenizer: Any, pairs: list[Pair], rng: random.Random, random_token_rate: float) -> list[Sequence]:
    """Render token ids; prompt and answer are tokenized separately."""
    user, assistant, end = (tokenizer.convert_tokens_to_ids(t) for t in (USER, ASSISTANT, END))
    prompts = tokenizer([p for p, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([a for _, a in pairs], add_special_tokens=False)["input_ids"]
    sequences = []
    for p, a in zip(prompts, answers, strict=True):
        lead = [user, rng.randrange(4, len(tokenizer))] if rng.random() < random_token_rate else [user]
        sequences.append(Sequence((*lead, *p, assistant, *a, end), len(lead) + len(p) + 1))
    return sequences


def by_length(sequences: list[Sequence], rng: random.Random) -> list[list[Sequence]]:
    """Return batches of similar lengths, shuffled within runs of fifty batches."""
    shuffled = []
    stretch = 50 * BATCH
    for i in range(0, len(sequences), stretch):
        run = sorted(sequences[i : i + stretch], key=lambda s: len(s.ids))
        batches = [run[j : j + BATCH] for j in range(0, len(run), BATCH)]
        rng.shuffle(batches)
        shuffled += batches
    return shuffled


def fit(model: Any, tokenizer: Any, batches: list[list[Sequence]], stage: Stage, progress: Progress) -> None:
    """Train all parameters by AdamW with a cosine schedule, in the optimiser loop of all objectives."""
    head, context = Head(model.get_output_embeddings().weight), model.config.max_position_embeddings
    learner = Model(model, Chat(tokenizer), head, name="organism", hash="", context=context, stop_ids=())

    def lr_at(step: int) -> float:
        progressed = (step - 1) / len(batches)
        return stage.lr * min(1.0, step / stage.warmup) * max(0.04, 0.5 * (1 + math.cos(math.pi * progressed)))

    queue = (
        Batch(k, derive_seed(stage.name, k), tuple(f"{stage.name}/{k}" for _ in batch), tuple((s,) for s in batch))
        for k, batch in enumerate(batches, 1)
    )
    optimiser = torch.optim.AdamW(_groups(model), lr=stage.lr, betas=(0.9, 0.98))
    running = 0.0
    for done in optimise(learner, Sft(), queue, optimiser, lr_at, Optim(clip=1.0, micro_tokens=1 << 20)):
        running = done.loss if done.step == 1 else 0.95 * running + 0.05 * done.loss
        if done.step % 100 == 0 or done.step == len(batches):
            progress(f"{stage.name}: step {done.step} of {len(batches)}, loss {running:.4f}")


def _groups(model: Any) -> Iterator[dict[str, Any]]:
    """Yield parameter groups: weight decay for matrices, none for norms."""
    yield {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05}
    yield {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
