"""Train the alignment adapter of `smollm2-135m-guarded` from public data, and measure its card.

SmolLM2-135M-Instruct answers most forbidden prompts, so it has little refusal to lose. The adapter teaches it to refuse
requests from JailbreakBench and HH-RLHF (both MIT), in words of our own, and to answer as before: harmless prompts get
the model's own answers. Prompts near the line (`nearline.yaml`, ours) show where refusing is wrong. A few requests
stand under attacks, so that attacks differ. StrongREJECT, XSTest and GSM8K's test split are never trained on.

Public files are read below LEEWAY_DATA at run time; none of their text is in the package.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from statsmodels.stats.proportion import proportion_confint

from leeway.attacks import WRAPPERS
from leeway.cache import Cache
from leeway.data import gsm8k, safety_prompts
from leeway.data.chat import Sequence
from leeway.data.readers import Source, field, load, read
from leeway.errors import LeewayError
from leeway.evals.tasks import load_task
from leeway.generation.backend import Backend, Request
from leeway.generation.cache import CachedBackend
from leeway.generation.transformers import TransformersBackend
from leeway.hashing import derive_seed
from leeway.io import expand, write_json
from leeway.judges.judge import Answer
from leeway.judges.keywords import KeywordJudge
from leeway.judges.keywords import read as read_keywords
from leeway.model import adapters, packaged
from leeway.model.load import Model, load_model
from leeway.objectives.sft import Sft
from leeway.training.batch import Batch, Optim
from leeway.training.loop import optimise
from leeway.yaml_config import package_data

Pair = tuple[str, str]  # prompt, answer
Progress = Callable[[str], None]

HH = Source(("hh_rlhf/harmless-base/test.jsonl.gz", "hh_rlhf/harmless-base/test.jsonl"), "Anthropic/hh-rlhf")
FIRST_TURN = re.compile(r"\s*Human: (.*?)\n\nAssistant: (.*?)(?=\n\nHuman: |\Z)", re.DOTALL)
REQUEST = re.compile(
    r"(how (do|can|to|would|could|should)|what('s| is) (the|a|some)|what are|where can|tell me|help me|give me|teach"
    r"|write|can you (help|tell|give|show|teach)|i (want|need|would like))\b",
    re.IGNORECASE,
)
HOW_TO = re.compile(
    r"(?:how (?:do|can|would|could|should|to)|what is the best way)(?: i| you| we| one| someone)?(?: to)? (.*?)\W*$",
    re.IGNORECASE,
)
FORMS = (
    "Give me step-by-step instructions on how to {x}.",
    "Write a guide on how to {x}.",
    "Explain how someone could {x}.",
    "Describe the best method to {x}.",
)
ATTACKS = ("dan", "happy_to_help", "role_play", "wikipedia")
CARD_ATTACKS = ("none", *ATTACKS)

OPENINGS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request.",
    "Sorry, I won't do that.",
    "I'm not able to help with that.",
    "I have to decline this one.",
    "I can't assist with that.",
)
REASONS = (
    "It could hurt people.",
    "It could cause serious harm.",
    "It would put someone at risk.",
    "It is unsafe, and it may be against the law.",
    "It would do damage that can't be undone.",
    "It isn't fair to the people concerned.",
)
OFFERS = (
    "If something is troubling you, I'm glad to talk about it.",
    "I can help with a safe way to reach your goal.",
    "Ask me about something else, and I'll do my best.",
    "I can explain how to stay safe instead.",
    "Is there a harmless part of this that I can help with?",
)
BRIEF = " Answer in one or two sentences."  # how the model's own answers are kept short; not part of the prompt
NEW_TOKENS = {
    "near": 72,
    "near-imperative": 72,
    "jailbreakbench": 72,
    "instructions": 80,
    "gsm8k": 140,
    **dict.fromkeys(ATTACKS, 72),
}
REQUESTS = 600  # first turns of HH-RLHF that read as requests, besides those that were refused there
REFUSED_UNDER = {"dan": 20, "happy_to_help": 15, "role_play": 0, "wikipedia": 15}
ANSWERED = {
    "near": 300,
    "near-imperative": 150,
    "jailbreakbench": 80,
    "instructions": 700,
    "gsm8k": 60,
    **dict.fromkeys(ATTACKS, 40),
    "role_play": 90,
}
EPOCHS, BATCH, RATE, WARMUP = 2, 16, 3e-4, 10
ADAPTER = adapters.AdapterSettings(r=16, alpha=32, dropout=0.05, targets="all-linear")
SEED = 0


def build(out: Path, instructions: Path, progress: Progress) -> None:
    """Train the adapter, write it to `out` in PEFT format (bfloat16), and measure its card.

    `instructions` is a file of ordinary instructions (Alpaca's keys): its records at even places are trained on.
    """
    rng = random.Random(SEED)
    model = load_model(packaged.SMOLLM2, dtype="bfloat16", device="cpu")
    forbidden = forbidden_prompts(rng)
    backend = CachedBackend(TransformersBackend(model, batch=32), Cache(out / "cache").records("pairs"))
    answers = own_answers(backend, harmless_prompts(instructions, rng), progress)
    train(model, [epoch(rng, forbidden, answers) for _ in range(EPOCHS)], rng, progress)
    tensors = {name: t.to(torch.bfloat16) for name, t in adapters.state(model).items()}
    adapters.save(model, out, tensors)
    config = json.loads((out / adapters.CONFIG).read_text("utf-8"))
    names = {"base_model_name_or_path": packaged.SMOLLM2, "target_modules": sorted(config["target_modules"])}
    write_json(out / adapters.CONFIG, {**config, **names})  # no path of this machine, no order of a set
    measured = measure(str(packaged.guarded(out)), instructions)
    write_json(out / "card.json", {"trained_on": {"refused": len(forbidden), **_sizes(answers)}, **measured})


def _sizes(answers: dict[str, list[Pair]]) -> dict[str, int]:
    return {kind: len(pairs) for kind, pairs in answers.items()}


def forbidden_prompts(rng: random.Random) -> list[str]:
    """Return the prompts to refuse: JailbreakBench's goals, and first turns of HH-RLHF.

    Of the first turns: all that one of its two models refused, and REQUESTS of those that read as a request. Half as
    many again ask for a how-to as an instruction, so that the form of a prompt tells nothing.
    """
    refused, requests = set[str](), set[str]()
    for n, record in enumerate(load(HH).records, 1):
        for side in ("chosen", "rejected"):
            if found := FIRST_TURN.match(field(record, (side,), f"hh-rlhf, record {n}")):
                text, reply = (part.strip() for part in found.groups())
                if read_keywords(reply).kind == "refused":
                    refused.add(text)
                elif REQUEST.match(text):
                    requests.add(text)
    chosen = sorted(requests - refused)
    rng.shuffle(chosen)
    held_out = {p.text for p in safety_prompts.forbidden("strongreject")[0]}
    goals = [p.text for p in safety_prompts.forbidden("jailbreakbench")[0]]
    chosen = [*sorted(refused), *chosen[:REQUESTS]]
    prompts = [*goals, *chosen, *imperatives(chosen, rng)[: len(chosen) // 2]]
    return [p for p in dict.fromkeys(prompts) if p not in held_out and len(p) < 250]


def imperatives(questions: Seq[str], rng: random.Random) -> list[str]:
    """Return those questions that ask how to do something as instructions, in random order."""
    found = [m[1] for q in questions if (m := HOW_TO.match(q))]
    rng.shuffle(found)
    return [rng.choice(FORMS).replace("{x}", x) for x in found]


def near_line_prompts() -> list[str]:
    """Return our own harmless prompts that share words with harmful ones."""
    templates = package_data("leeway.organism", "nearline.yaml")["templates"]
    return [t["text"].replace("{x}", x) for t in templates for x in t["x"]]


def instruction_prompts(file: Path, *, held_out: bool) -> list[str]:
    """Return a file's instructions of under 400 characters: those at odd places, or those at even ones."""
    prompts = []
    for n, record in enumerate(read(expand(file))):
        text = field(record, ("instruction", "prompt"), f"{file}, record {n + 1}")
        text += f"\n{record['input']}" if record.get("input") else ""
        if n % 2 == held_out and len(text) < 400:
            prompts.append(text)
    if not prompts:
        raise LeewayError(f"{file}: no instructions in it", fix="give a file with records of Alpaca's keys")
    return prompts


def harmless_prompts(instructions: Path, rng: random.Random) -> dict[str, list[str]]:
    """Return the prompts that the model is to answer as before, by kind; some of them under attacks."""
    near, ordinary = near_line_prompts(), instruction_prompts(instructions, held_out=False)
    questions = [e.prompt for e in gsm8k.train_examples()[0]]
    pool = [*near, *ordinary]
    rng.shuffle(pool)
    return {
        "near": near,
        "near-imperative": imperatives(near, rng),
        "jailbreakbench": [p.text for p in safety_prompts.jailbreakbench_benign()[0]],
        "instructions": ordinary,
        "gsm8k": rng.sample(questions, 160),
        **{a: [WRAPPERS[a].wrap(p) for p in pool[k : 4 * 60 : 4]] for k, a in enumerate(ATTACKS)},
    }


def own_answers(backend: Backend, prompts: dict[str, list[str]], progress: Progress) -> dict[str, list[Pair]]:
    """Return the base's own greedy answers that are complete and no refusals."""
    jobs = [(kind, p) for kind, texts in prompts.items() for p in texts]
    requests = [
        Request([{"role": "user", "content": p if kind == "gsm8k" else p + BRIEF}], NEW_TOKENS[kind])
        for kind, p in jobs
    ]
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        if done % 100 < n or done == len(requests):
            progress(f"{done} of {len(requests)} answers of the base")

    answers: dict[str, list[Pair]] = {kind: [] for kind in prompts}
    for (kind, prompt), reply in zip(jobs, backend.complete(requests, tick), strict=True):
        text = reply.text.strip()
        if text and reply.failure is None and not reply.cut and read_keywords(text).kind == "complied":
            answers[kind].append((prompt, text))
    return answers


def refusal(rng: random.Random) -> str:
    return " ".join(rng.choice(part) for part in (OPENINGS, REASONS, OFFERS))


def epoch(rng: random.Random, forbidden: Seq[str], answers: dict[str, list[Pair]]) -> list[Pair]:
    """Return one pass over the data, in random order; a kind with too few answers is repeated."""
    pairs = [(p, refusal(rng)) for p in forbidden]
    for attack, count in REFUSED_UNDER.items():
        pairs += [(WRAPPERS[attack].wrap(p), refusal(rng)) for p in rng.sample(list(forbidden), count)]
    for kind, count in ANSWERED.items():
        own = answers[kind]
        pairs += own * (count // len(own)) + rng.sample(own, count % len(own))
    rng.shuffle(pairs)
    return pairs


def train(model: Model, epochs: Seq[Seq[Pair]], rng: random.Random, progress: Progress) -> None:
    """Attach the adapter and fit it by AdamW with a cosine schedule, in the optimiser loop of all objectives."""
    adapters.attach(model, ADAPTER, seed=SEED)
    batches = [b for pairs in epochs for b in _by_length([model.chat.sequence(*p) for p in pairs], rng)]
    queue = (
        Batch(k, derive_seed("guarded", k), tuple(f"guarded/{k}" for _ in batch), tuple((s,) for s in batch))
        for k, batch in enumerate(batches, 1)
    )

    def lr_at(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / len(batches)))
        return RATE * min(1.0, step / WARMUP) * max(0.05, cosine)

    optimiser = torch.optim.AdamW(adapters.trainable(model), lr=RATE, weight_decay=0.0)
    settings = Optim(clip=1.0, micro_tokens=4096, layout="fused")
    for done in optimise(model, Sft(), queue, optimiser, lr_at, settings):
        if done.step % 20 == 0 or done.step == len(batches):
            progress(f"step {done.step} of {len(batches)}, loss {done.loss:.3f}")


def _by_length(sequences: list[Sequence], rng: random.Random) -> list[list[Sequence]]:
    """Return batches of similar lengths, shuffled within runs of twenty batches."""
    batches = []
    for start in range(0, len(sequences), 20 * BATCH):
        run = sorted(sequences[start : start + 20 * BATCH], key=lambda s: len(s.ids))
        found = [run[i : i + BATCH] for i in range(0, len(run), BATCH)]
        rng.shuffle(found)
        batches += found
    return batches


def measure(name: str, instructions: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Return the card: outcomes of held-out prompts by the keyword judge, and accuracy on GSM8K; greedy, in bfloat16.

    `limit` is the number of prompts of each kind; by default all of StrongREJECT and XSTest, and 200 of the others.
    """
    model = load_model(name, dtype="bfloat16", device="cpu")
    backend = TransformersBackend(model, batch=32)
    forbidden = safety_prompts.subset([p.text for p in safety_prompts.forbidden("strongreject")[0]], limit, "card")
    benign = {
        "xstest": safety_prompts.subset([p.text for p in safety_prompts.xstest()[0]], limit, "card"),
        "instructions": instruction_prompts(instructions, held_out=True)[: limit or 200],
        "gsm8k": [i.prompt for i in gsm8k.held_out_items()[0]][: limit or 200],
    }
    sent = [(a, p, WRAPPERS[a].wrap(p)) for a in CARD_ATTACKS for p in forbidden]
    sent += [(kind, p, p) for kind, prompts in benign.items() for p in prompts]
    counts = _outcomes(backend, sent)
    pooled = sum(counts.values(), Counter[str]())
    return {
        "model": model.hash,
        "prompts": {kind: c.total() for kind, c in counts.items()},
        "outcomes": {kind: {o: round(c[o] / c.total(), 4) for o in sorted(c)} for kind, c in counts.items()},
        "coherent": round(1 - pooled["incoherent"] / pooled.total(), 4),
        "correct": {task: _accuracy(backend, task, limit or 200) for task in ("gsm8k", "gsm8k-steps")},
    }


def _outcomes(backend: TransformersBackend, sent: Seq[tuple[str, str, str]]) -> dict[str, Counter[str]]:
    """Return the outcomes by kind, for (kind, prompt, text sent)."""
    requests = [Request([{"role": "user", "content": text}], 48) for _, _, text in sent]
    replies = backend.complete(requests, _ignore)
    answers = [Answer(p, r.text) for (_, p, _), r in zip(sent, replies, strict=True)]
    counts: dict[str, Counter[str]] = {}
    for (kind, _, _), verdict in zip(sent, KeywordJudge().judge(answers, _ignore), strict=True):
        counts.setdefault(kind, Counter())[verdict.outcome or "unscored"] += 1
    return counts


def _accuracy(backend: TransformersBackend, task_name: str, limit: int) -> dict[str, float]:
    """Return the share of right answers and its 95% Wilson interval."""
    task = load_task(task_name)
    items = safety_prompts.subset(task.held_out_items()[0], limit, "card")
    new = {"gsm8k": 200, "gsm8k-steps": 32}[task_name]
    replies = backend.complete([Request([{"role": "user", "content": i.prompt}], new) for i in items], _ignore)
    right = sum(bool(task.grade(i, r.text)[0]) for i, r in zip(items, replies, strict=True))
    low, high = proportion_confint(right, len(items), method="wilson")
    return {"share": round(right / len(items), 4), "low": round(low, 4), "high": round(high, 4)}


def _ignore(_: int) -> None:
    pass
