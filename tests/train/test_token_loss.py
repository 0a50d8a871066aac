"""The test loss is the mean over all labelled tokens, whatever the batches."""

import copy

import pytest
from datasets import Dataset, DatasetDict

import qrefta
from tests.models import tiny_llama
from tests.train.talk import chat_rows, words

pytest.importorskip("trl")


@pytest.mark.slow
def test_the_test_loss_does_not_depend_on_the_batches(tmp_path):
    """Three short answers and a long one; alone, padded, and joined without padding."""
    model = tiny_llama(32)
    long = [{"role": "user", "content": "what is sky ?"}]
    long.append({"role": "assistant", "content": "blue " * 20})
    rows = Dataset.from_list([*chat_rows(3), {"messages": long}])
    losses = []
    for batch_size, padding_free in ((1, False), (3, False), (4, True)):
        result = qrefta.finetune(
            copy.deepcopy(model),
            words(),
            DatasetDict(train=rows, test=rows),
            tmp_path / f"{batch_size}{padding_free}",
            task="sft",
            max_steps=1,
            batch_size=batch_size,
            padding_free=padding_free,
            progress=False,
        )
        losses.append(result.test_loss_before)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
