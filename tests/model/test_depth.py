"""Blocks that are removed, reordered or copied after `prepare`."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import qrefta
from qrefta.config import StackReport
from tests.models import VOCAB, prepared, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen3

IDS = torch.arange(1, 13).reshape(2, 6) % VOCAB


def moved(make, **settings):
    """A prepared model whose updates are not zero."""
    model = prepared(make, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factors in model.qrefta_factors.values():
            for parameter in factors.trained():
                parameter.add_(torch.randn(parameter.shape, generator=generator).mul_(0.1))
            factors.round_masters()
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def keep(model, numbers):
    """Keep some blocks, in this order."""
    blocks = list(model.model.layers)
    model.model.layers = nn.ModuleList(blocks[number] for number in numbers)
    model.config.num_hidden_layers = len(numbers)
    for place, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = place
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in numbers]


CUTS = {"first removed": [1, 2], "every second": [0, 2], "one left": [1], "reversed": [2, 1, 0]}


@pytest.mark.parametrize("method", ["windows", "refta", "craft", "tera"])
@pytest.mark.parametrize("numbers", CUTS.values(), ids=CUTS)
def test_a_model_whose_blocks_were_removed_or_reordered_is_saved_and_loaded(
    method, numbers, tmp_path
):
    model = moved(tiny_llama, method=method, rank=4)
    keep(model, numbers)
    expected = logits(model)
    model.save_pretrained(tmp_path / "cut")
    loaded = qrefta.load(tmp_path / "cut")
    assert_close(logits(loaded), expected, rtol=0, atol=0)
    assert len(loaded.model.layers) == len(numbers)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_close(logits(again), expected, rtol=0, atol=0)
    dense = qrefta.merge(again, dtype=torch.float32)
    assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_mixtral])
def test_blocks_of_other_models_are_removed(make, tmp_path):
    model = moved(make, rank=4, target_modules=r".*\.[qv]_proj")
    keep(model, [1])
    expected = logits(model)
    model.save_pretrained(tmp_path / "cut")
    assert_close(logits(qrefta.load(tmp_path / "cut")), expected, rtol=0, atol=0)
    rows = {row["stack"]: row["layers"] for row in qrefta.quant_report(model)}
    assert rows["model.layers.*.self_attn.q_proj"] == 1


def test_a_cut_model_is_cut_again_trained_and_merged_to_a_folder(tmp_path):
    model = moved(tiny_llama, rank=4)
    keep(model, [1, 2])
    model.save_pretrained(tmp_path / "once")
    model = qrefta.load(tmp_path / "once")
    keep(model, [1])
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    for factors in model.qrefta_factors.values():
        assert all(parameter.grad.isfinite().all() for parameter in factors.trained())
    expected = logits(model)
    model.save_pretrained(tmp_path / "twice")
    assert_close(logits(qrefta.load(tmp_path / "twice")), expected, rtol=0, atol=0)
    qrefta.merge(model, out=tmp_path / "dense", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)


def test_the_lora_of_a_cut_model_goes_on_its_residual_and_not_on_the_original(tmp_path):
    model = moved(tiny_llama, rank=4)
    keep(model, [0, 2])
    export = qrefta.export_lora(model, tmp_path / "lora", base="residual")
    assert export.difference < 0.05
    with pytest.raises(ValueError, match="removed or reordered after prepare"):
        qrefta.export_lora(model, tmp_path / "other", base="original", original=tiny_llama())


def test_the_report_counts_the_bytes_of_the_layers_that_remain():
    model = prepared(tiny_llama, rank=4)
    whole = qrefta.quant_report(model)[0]
    keep(model, [0, 1, 2])
    assert qrefta.quant_report(model)[0] == whole
    keep(model, [0])
    cut = qrefta.quant_report(model)[0]
    factors = model.qrefta_factors["stack0"].stored_bytes
    assert cut["bytes"] - factors == (whole["bytes"] - factors) / 3


def test_a_config_that_still_has_the_removed_blocks_is_refused_before_anything_is_written(tmp_path):
    model = prepared(tiny_llama, rank=4)
    del model.model.layers[1]
    with pytest.raises(ValueError, match=r"config\.num_hidden_layers = 2"):
        model.save_pretrained(tmp_path / "cut")
    assert not list((tmp_path / "cut").iterdir())
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "cut")
    assert_close(logits(qrefta.load(tmp_path / "cut")), logits(model), rtol=0, atol=0)


def test_the_name_of_the_depth_is_the_configs(tmp_path):
    model = prepared(tiny_gpt2, rank=4)
    del model.transformer.h[0]
    with pytest.raises(ValueError, match=r"config\.n_layer = 2"):
        model.save_pretrained(tmp_path / "cut")


def test_a_copied_block_is_refused_when_it_is_saved(tmp_path):
    model = prepared(tiny_llama, rank=4)
    model.model.layers.append(copy.deepcopy(model.model.layers[2]))
    model.config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="was copied with its block"):
        model.save_pretrained(tmp_path / "copied")
    assert not list((tmp_path / "copied").iterdir())


@pytest.mark.parametrize("replaced", [slice(1), slice(None)])
def test_replaced_layers_are_refused_when_the_model_is_saved(replaced, tmp_path):
    model = prepared(tiny_llama, rank=4)
    for block in model.model.layers[replaced]:
        block.mlp.gate_proj = nn.Linear(32, 64, bias=False)
    with pytest.raises(ValueError, match="is no quantized layer any more"):
        model.save_pretrained(tmp_path / "without")


def test_damaged_rows_are_refused():
    model = prepared(tiny_llama, rank=4)
    keep(model, [0, 2])
    qrefta.quant_report(model)
    row = model.config.quantization_config.stacks[0].to_dict()
    assert (row["rows"], row["prepared_layers"]) == ((0, 2), 3)
    for rows, prepared_layers in [((0, 3), 3), ((0,), 3), ((0, 2), None), ((), 3), ("02", 3)]:
        with pytest.raises(ValueError, match="rows"):
            StackReport.from_dict(row | {"rows": rows, "prepared_layers": prepared_layers})
