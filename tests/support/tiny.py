"""Tiny random chat models on disk, one per architecture, so that nothing is tied to the organism."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2")

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# trims contents and writes the BOS itself, as Llama 3 and Gemma do
TRIMMING = (
    "[bos]{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# an empty thought before an answer, as Qwen 3 does
THINKING = (
    "{% for m in messages %}[{{ m['role'] }}]\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
TEMPLATES = {"llama": TRIMMING, "qwen2": PLAIN, "qwen3": THINKING, "gemma2": TRIMMING}
CORPUS = [
    "How many apples are there? 3 + 4 = 7. The answer is 7.",
    "Yes No yes no",
    "#### 12",
    "Sorry, I cannot help.",
]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens with a chat template of our own."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["[pad]", "[bos]", "[end]", "[user]", "[assistant]", "[system]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[pad]", bos_token="[bos]", eos_token="[end]")
    if template is not None:
        fast.chat_template = template
    return fast


def build(kind: str, folder: Path, *, template: bool = True, context: int = 2048) -> Path:
    """Write a random model of this architecture; tied and untied heads, grouped heads and soft-capping all occur."""
    fast = tokenizer(TEMPLATES[kind] if template else None)
    shared = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
    }
    torch.manual_seed(0)
    if kind == "llama":
        lm = LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=False))
    elif kind == "qwen2":
        lm = Qwen2ForCausalLM(Qwen2Config(**{**shared, "vocab_size": len(fast) + 8}, tie_word_embeddings=True))
    elif kind == "qwen3":
        lm = Qwen3ForCausalLM(Qwen3Config(**shared, head_dim=8, tie_word_embeddings=True))
    else:
        lm = Gemma2ForCausalLM(
            Gemma2Config(**shared, head_dim=8, final_logit_softcapping=5.0, query_pre_attn_scalar=8, sliding_window=64)
        )
    lm.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
