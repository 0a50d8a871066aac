"""Tiny tokenizers with chat templates, and conversations for them."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["[UNK]", "[PAD]", "[EOS]", "user", "assistant", "system", ":"]
WORDS += ["what", "is", "red", "blue", "sky", "blood", "?"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
QUESTION = [{"role": "user", "content": "what is sky ?"}]
ANSWER = [{"role": "assistant", "content": "blue"}]


def words():
    """A tokenizer for WORDS, with TEMPLATE."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    split = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=split, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )
    fast.chat_template = TEMPLATE
    return fast


def letters():
    """A tokenizer with one token a byte, so that every text can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "<end>"])}
    split = Tokenizer(models.BPE(vocabulary, merges=[]))
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=split, eos_token="<end>")


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat_rows(count):
    """Questions about two things, each with one right answer."""
    rows = []
    for index in range(count):
        thing, color = [("sky", "blue"), ("blood", "red")][index % 2]
        question = {"role": "user", "content": f"what is {thing} ?"}
        rows.append({"messages": [question, {"role": "assistant", "content": color}]})
    return rows


def pair_rows(count):
    """The same, with the right and the other answer."""
    other = {"blue": "red", "red": "blue"}
    rows = []
    for row in chat_rows(count):
        *prompt, chosen = row["messages"]
        rejected = {"role": "assistant", "content": other[chosen["content"]]}
        rows.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    return rows
