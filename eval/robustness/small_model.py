"""A small decoder with random weights, its tokenizer and its text, for studies of many runs."""

import random
from pathlib import Path

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from eval.studies.out_of_core import write_checkpoint

WORDS = 60
SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS + len(SPECIAL),
    "dtype": "bfloat16",
}


def write_decoder(folder: Path) -> None:
    """Write the dense checkpoint with its tokenizer."""
    write_checkpoint(folder, LlamaConfig(**SHAPE))
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers below `WORDS`."""
    vocabulary = {word: at for at, word in enumerate([*SPECIAL, *map(str, range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def numbers() -> DatasetDict:
    """32 training and 8 test lines of 40 words; each word is its predecessor plus 1 to 3."""
    chance = random.Random(0)
    lines = []
    for _ in range(40):
        word = chance.randrange(WORDS)
        line = []
        for _ in range(40):
            word = (word + chance.randint(1, 3)) % WORDS
            line.append(str(word))
        lines.append({"text": " ".join(line)})
    return DatasetDict(train=Dataset.from_list(lines[:32]), test=Dataset.from_list(lines[32:]))
