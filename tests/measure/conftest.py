"""A tiny language model and a text for it."""

import random

import pytest

from tests.models import tiny_llama
from tests.pages import language_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("language")
    tiny_llama(hidden=64).save_pretrained(folder)
    language_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """150 random words; w1 and w2 are special, and would be cut off from w10 to w29."""
    generator = random.Random(0)
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    file.write_text(" ".join(f"w{generator.randrange(30, 96)}" for _ in range(150)))
    return file
