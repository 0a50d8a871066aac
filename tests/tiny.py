"""A tiny classifier with its tokenizer, and a task for it: does a sentence hold red or blue?"""

import random

from datasets import ClassLabel, Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from tests.models import VOCAB, build, encoder_sizes

WORDS = ["red", "blue", *(f"word{index}" for index in range(40))]


def tiny_tokenizer():
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def tiny_folder(path, width=32):
    """Save a seeded tiny BERT with a head for two classes, and its tokenizer, in `path`."""
    config = BertConfig(
        vocab_size=VOCAB, max_position_embeddings=64, num_labels=2, **encoder_sizes(width)
    )
    build(BertForSequenceClassification, config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def color_rows(count, seed):
    """Six-word sentences with `red` (label 0) or `blue` (label 1) at a random place."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        words = generator.sample(WORDS[2:], 6)
        words[generator.randrange(6)] = WORDS[index % 2]
        rows.append({"text": " ".join(words), "label": index % 2})
    return rows


def color_data(train=96, test=32):
    splits = {"train": color_rows(train, seed=1), "test": color_rows(test, seed=2)}
    label = ClassLabel(names=["red", "blue"])
    data = DatasetDict()
    for name, rows in splits.items():
        data[name] = Dataset.from_list(rows).cast_column("label", label)
    return data
