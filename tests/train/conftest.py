import pytest

from tests.train.talk import words


@pytest.fixture
def tokenizer():
    return words()
