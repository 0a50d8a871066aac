"""The study of the whole step: two processes take turns on a tiny model."""

import pytest
import torch
from torch.nn import functional

from eval.report.readme_table import whole_step_table
from eval.rows import read
from eval.studies import whole_step
from eval.studies.step_profile import KINDS, StepProfile, kind_of
from tests.models import tiny_llama
from tests.train.talk import words

pytest.importorskip("trl")


def test_processes_take_turns_and_their_tokens_are_counted(tmp_path):
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    tiny_llama(64).save_pretrained(model)
    tokenizer = words()
    tokenizer.save_pretrained(model)
    whole_step.run(
        "trl qlora r=16,qrefta R=24",
        str(model),
        steps=2,
        batch_size=2,
        length=0,
        bf16=False,
        checkpointing=True,
        threads=1,
        memory=False,
        profiled=False,
        rows=rows,
        child="",
        watched="",
    )
    theirs, ours = read(rows)
    settings = whole_step.Run(str(model), 4, 2, 0, False, True, 1)
    lengths = [
        len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
        for messages in whole_step.data_of(settings, tokenizer)["messages"]
    ]
    for row in (theirs, ours):
        assert row["steps"] == 1  # the first is left out
        assert sum(sorted(lengths)[:2]) <= row["tokens"] <= sum(sorted(lengths)[2:])
    assert theirs["tokens_per_s_of_qlora"] == 1
    assert ours["trained_parameters"] < theirs["trained_parameters"]
    table = whole_step_table(
        [row | {"peak_bytes": 2e6, "peak_bytes_of_qlora": 0.5} for row in read(rows)]
    )
    assert "| 2 of 16 to 512 tokens | float32 | qrefta R=24 |" in table


def test_rows_of_one_length_are_longer_than_it():
    tokenizer = words()
    settings = whole_step.Run("", 4, 2, 48, False, True, 1)
    for messages in whole_step.data_of(settings, tokenizer)["messages"]:
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert len(ids) > 48


def test_a_profile_tells_the_kinds_of_operations_apart():
    """Of a small layer with a factor of width 4 and a head of 300 words."""
    up, weight = torch.randn(4, 96, requires_grad=True), torch.randn(96, 96)
    head = torch.randn(96, 300)
    optimizer = torch.optim.AdamW([up])
    x = torch.randn(256, 96)
    profile = StepProfile(words=300)
    profile.start()
    hidden = x @ weight + (x[:, :4] @ up)
    hidden = functional.scaled_dot_product_attention(*3 * [hidden.view(1, 4, 64, 96)])
    (hidden.reshape(256, 96) @ head).logsumexp(1).sum().backward()
    optimizer.step()
    seconds = profile.stop()
    assert tuple(seconds) == KINDS
    assert {kind for kind in KINDS if seconds[kind] > 0} == set(KINDS) - {"dequantization"}
    assert kind_of("bitsandbytes::dequantize_4bit", [[64, 64]], 300) == "dequantization"


@pytest.mark.parametrize("method", ["qlora r=16", "qrefta r=8", "trl qlora r=0", "qrefta R=", ""])
def test_unknown_methods_are_refused(method):
    with pytest.raises(ValueError, match="is not a method; give 'trl qlora r=16' or 'qrefta R=64'"):
        whole_step.parse(method)
