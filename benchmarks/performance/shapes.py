"""Random Llamas of fixed shape and seed, and a tokenizer trained on GSM8K's text: written to disk, once."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content -}}"
    "{%- if m.role == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
CONTEXT = 2048  # positions; no GSM8K example reaches it


@dataclass(frozen=True)
class Shape:
    """A Llama: width, layers, query heads, FFN width, vocabulary; fewer key heads or a tied head where given."""

    name: str
    width: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    key_heads: int | None = None
    tied: bool = False

    @property
    def key_width(self) -> int:
        """Width of all key heads."""
        return self.width // self.heads * (self.key_heads or self.heads)


SHAPES = {
    s.name: s
    for s in (
        Shape("S", 256, 6, 4, 688, 8_192),
        Shape("M", 512, 8, 8, 1376, 32_768),
        Shape("V", 512, 8, 8, 1376, 131_072),  # M under a vocabulary as large as they come, for the memory's growth
        Shape("SmolLM2", 576, 30, 9, 1536, 49_152, key_heads=3, tied=True),  # of SmolLM2-135M
        Shape("tiny", 32, 2, 2, 64, 512),  # for the tests
    )
}


def written(shape: Shape, folder: Path, texts: Seq[str]) -> Path:
    """The model's folder under `folder`; made where it is not there yet."""
    place = folder / shape.name
    if not (place / "done").is_file():
        tokenizer = make_tokenizer(shape.vocabulary, texts)
        make_model(shape, tokenizer).save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place / "done").touch()
    return place


def make_tokenizer(vocabulary: int, texts: Seq[str]) -> Any:
    """Byte-level BPE with as many tokens as the texts give, at most `vocabulary`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(shape: Shape, tokenizer: Any) -> Any:
    """Float32 random weights; the head's are wide enough that greedy tokens are seldom near-ties."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads or shape.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=shape.tied,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    torch.nn.init.normal_(lm.lm_head.weight, std=0.1)
    return lm
