"""Tiny language models of the families that GGUF files are written for, with trained tokenizers."""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import qrefta
from tests.models import build

VOCAB = 512
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "The river runs quietly past the old mill, and in the evening nobody is on the bridge.",
    "Although the second half of the film is much too long, its music is very good.",
    "In 2026 it cost 1234567 dollars; we'll see what they've made of it in 3.5 years.\n\n\tBye.",
    "Größe, naïve café, Привет мир, 你好世界, and a rocket \U0001f680!",
]
SENTENCES = [*TEXTS, "  two  spaces, I'LL be back   ", "the mill\nthe bridge"]


def split(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level_tokenizer(pre_tokenizer=None):
    """Byte-level BPE with ChatML's tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or split(LLAMA3_SPLIT)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 40,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def sentencepiece_tokenizer(kind=LlamaTokenizer):
    """SentencePiece's BPE with bytes as fallback: vocabulary in the order of the merges."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    learned.train_from_iterator(TEXTS[:3] * 3, trainer)
    numbers = learned.get_vocab()
    texts = sorted(numbers, key=numbers.get)
    special = ["<unk>", "<s>", "</s>"]
    if kind is GemmaTokenizer:
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    merged = [text for text in texts if len(text) > 1]
    tokens += merged + [text for text in texts if len(text) == 1]
    vocabulary = {text: number for number, text in enumerate(tokens)}
    # every split of a token into two tokens is a merge, as transformers derives them
    merges = [
        (text[:cut], text[cut:])
        for text in merged
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    return kind(vocab=vocabulary, merges=merges, add_bos_token=True)


def sizes(**changes):
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "head_dim": 16,
    } | changes


def with_norms(model):
    """The model with norms that are not all alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise)
    return model


def language_model(family):
    """The model, with a config that no other model has, and the tokenizer of a family."""
    kind, config, tokenizer = MODELS[family]
    return with_norms(build(kind, copy.deepcopy(config))), tokenizer()


def llama3_rope():
    return {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }


MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**sizes()), byte_level_tokenizer),
    "llama, tied, scaled": (
        LlamaForCausalLM,
        LlamaConfig(**sizes(tie_word_embeddings=True, rope_parameters=llama3_rope())),
        byte_level_tokenizer,
    ),
    "llama, sentencepiece": (LlamaForCausalLM, LlamaConfig(**sizes()), sentencepiece_tokenizer),
    "llama, biases": (
        LlamaForCausalLM,
        LlamaConfig(**sizes(attention_bias=True, mlp_bias=True)),
        lambda: byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**sizes()), sentencepiece_tokenizer),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**sizes(tie_word_embeddings=True)),
        lambda: byte_level_tokenizer(split(QWEN2_SPLIT)),
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(**sizes(head_dim=32)),
        lambda: byte_level_tokenizer(split(QWEN2_SPLIT)),
    ),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**sizes(query_pre_attn_scalar=16, sliding_window=8)),
        lambda: sentencepiece_tokenizer(GemmaTokenizer),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**sizes(query_pre_attn_scalar=16, sliding_window=8, num_hidden_layers=7)),
        lambda: sentencepiece_tokenizer(GemmaTokenizer),
    ),
}


class GgufFile(NamedTuple):
    """A GGUF file and what it was made of."""

    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def write_gguf(folder, family="llama", kind="f16", **changes):
    """A tiny model of a family, as a GGUF file."""
    model, tokenizer = language_model(family)
    path = folder / "tiny.gguf"
    qrefta.export_gguf(model, path, kind, tokenizer=tokenizer, **changes)
    return GgufFile(path, model, tokenizer)
