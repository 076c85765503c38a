"""Transformers' `generate` in bf16 with the adapter merged into the weights for good: length-sorted greedy batches."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from benchmarks.performance import flops
from benchmarks.performance.peers import lora
from benchmarks.performance.task import Found, Task

DTYPE = torch.bfloat16


def imports() -> None:
    """What this side needs, so that memory before the model is known."""
    for name in ("peft", "transformers.models.llama.modeling_llama"):
        import_module(name)


def loaded(task: Task) -> tuple[Any, Any]:
    import peft
    from transformers import AutoModelForCausalLM, GenerationConfig

    lm = AutoModelForCausalLM.from_pretrained(task.folder, dtype=DTYPE, attn_implementation=task.tuned.attention)
    lm = peft.get_peft_model(lm, lora.config())
    lora.move(lm)
    lm = lm.merge_and_unload().eval()
    lm.generation_config = GenerationConfig()
    return lm, tokenizer(task)


def tokenizer(task: Task) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(task.folder, padding_side="left")


def generate(task: Task, asked: list[str]) -> Found:
    began = task.now()
    lm, words = loaded(task)
    setup = task.now() - began
    answers(lm, words, asked[:8], task.tuned.batch, 4)
    began = task.now()
    ids = answers(lm, words, asked, task.tuned.batch, task.new_tokens)
    seconds = task.now() - began
    texts = [words.decode(i[:16], skip_special_tokens=True) for i in ids]
    new = [len(i) for i in ids]
    work = flops.generation(task, [len(_prompt(words, text)) for text in asked], new)
    return Found(sum(new), seconds, setup_seconds=setup, texts=texts, flops=work)


def answers(lm: Any, words: Any, asked: list[str], batch: int, new_tokens: int) -> list[list[int]]:
    """New token ids of each prompt, up to its end."""
    prompts = [_prompt(words, text) for text in asked]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[list[int]] = [[]] * len(prompts)
    for k in range(0, len(order), batch):
        places = order[k : k + batch]
        inputs = words.pad({"input_ids": [prompts[i] for i in places]}, return_tensors="pt")
        with torch.no_grad():
            out = lm.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        for i, row in zip(places, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = row.index(words.eos_token_id) if words.eos_token_id in row else len(row)
            found[i] = row[:end]
    return found


def _prompt(words: Any, text: str) -> list[int]:
    turn = [{"role": "user", "content": text}]
    whole = words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return list(words(whole, add_special_tokens=False)["input_ids"])
