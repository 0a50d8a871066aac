"""Rows joined in one sequence: kept apart, computed row by row, and taken by sft on a CPU."""

import pytest
import torch

import qrefta
from qrefta.train.arguments import training_arguments
from qrefta.train.packing import (
    MOST_TOKENS,
    ROW_ATTENTION,
    check_apart,
    join_by_default,
    joined,
    joins_rows,
    keeps_rows_apart,
    row_by_row,
)
from tests.models import (
    build,
    tiny_llama,
    tiny_mistral,
    tiny_mixtral,
    tiny_qwen3,
)
from tests.train.talk import chat_rows, write_rows

ROWS = [[5, 6, 7], [8] * 9, [1, 2], list(range(40, 60))]


def sliding_mistral():
    """Its window is shorter than two of the rows."""
    model = tiny_mistral()
    model.config.sliding_window = 4
    return build(type(model), model.config)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_mixtral, sliding_mistral])
def test_row_by_row_the_output_is_that_of_single_rows(make):
    model = make()
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])
        with row_by_row(model):
            assert model.config._attn_implementation == ROW_ATTENTION
            found = model(**joined(ROWS)).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_row_by_row_no_row_is_compared_with_another(monkeypatch):
    """The kernel gets rows of their own lengths, and no mask."""
    seen = []

    def kernel(query, key, value, attn_mask=None, **_):
        seen.append((query.shape[2], key.shape[2], attn_mask))
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    model = tiny_llama()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    with torch.no_grad(), row_by_row(model):
        model(**joined(ROWS))
    lengths = [len(row) for row in ROWS]
    assert seen == [(length, length, None) for length in lengths] * model.config.num_hidden_layers


def test_a_model_that_ignores_positions_is_refused():
    model = tiny_llama()
    check_apart(model)
    assert joins_rows(model, 100)
    assert not joins_rows(model, MOST_TOKENS + 1)
    forward = model.forward
    model.forward = lambda **inputs: forward(**inputs | {"position_ids": None})
    with pytest.raises(ValueError, match="does not keep packed conversations apart; leave packing"):
        check_apart(model)
    assert not joins_rows(model, 100)
    model.forward = None  # code that refuses joined rows
    assert not joins_rows(model, 100)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"max_length": None}, False),  # nobody knows how large the mask becomes
        ({"padding_free": False}, False),
        ({"padding_free": True}, True),
        ({"packing": True}, None),
    ],
    ids=str,
)
def test_arguments_that_leave_it_open_join_rows_where_the_model_can(given, expected, tmp_path):
    """Those of `training_arguments`, which the command line makes."""
    pytest.importorskip("trl")
    args = training_arguments("sft", tmp_path, **given)
    join_by_default(tiny_llama(), args)
    assert args.padding_free is expected


def test_on_a_gpu_rows_are_joined_with_flash_attention_only(monkeypatch):
    """Of models whose layers are all attention."""
    model = tiny_llama()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not joins_rows(model, 100)
    model.config._attn_implementation = "flash_attention_2"
    assert joins_rows(model, 100)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert joins_rows(model, 100)
    for other in ("conv", "linear_attention"):
        model.config.layer_types = ["full_attention", other]
        assert not joins_rows(model, 100)


def test_pefts_models_join_rows_too():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    assert joins_rows(peft.get_peft_model(tiny_llama(), config), 100)


def test_other_attention_stays_as_it_is():
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    assert keeps_rows_apart(eager)
    assert not joins_rows(eager, 100)
    with row_by_row(eager):
        assert eager.config._attn_implementation == "eager"


@pytest.mark.slow
def test_sft_joins_rows_by_default_and_says_the_same_loss(tokenizer, tmp_path):
    pytest.importorskip("trl")
    file = write_rows(tmp_path / "chat.jsonl", chat_rows(40))
    losses = {}
    for joins in (None, False):
        model = qrefta.prepare(tiny_llama(), rank=24, refine=0, progress=False)
        result = qrefta.finetune(
            model,
            tokenizer,
            file,
            tmp_path / str(joins),
            task="sft",
            max_steps=2,
            batch_size=4,
            max_length=32,
            padding_free=joins,
            progress=False,
        )
        losses[joins] = result.test_loss_before
        assert model.config._attn_implementation == "sdpa"
        assert ROW_ATTENTION not in (tmp_path / str(joins) / "config.json").read_text()
    assert losses[None] == pytest.approx(losses[False], rel=1e-4)
