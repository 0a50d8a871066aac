"""Blocks that are removed, reordered or copied after `prepare`."""

import copy

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Wav2Vec2Config, Wav2Vec2ForCTC

import qrefta
from qrefta.config.report import StackReport
from tests.models import (
    VOCAB,
    build,
    encoder_sizes,
    prepared,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_qwen3,
)

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


def test_a_parametrized_module_is_refused_when_the_model_is_saved(tmp_path):
    """The file would have the tensors under other names, and no model would load it."""
    model = prepared(tiny_llama, rank=4)
    for module, name in ((model.lm_head, "weight"), (model.qrefta_factors["stack0"], "A")):
        parametrize.register_parametrization(module, name, nn.Identity())
        with pytest.raises(ValueError, match=r"is parametrized .*remove_parametrizations"):
            model.save_pretrained(tmp_path / "out")
        parametrize.remove_parametrizations(module, name)
    assert not list((tmp_path / "out").iterdir())
    model.save_pretrained(tmp_path / "out")
    assert_close(logits(qrefta.load(tmp_path / "out")), logits(model), rtol=0, atol=0)


def test_a_class_with_parametrizations_of_its_own_is_saved(tmp_path):
    """wav2vec 2.0 has weight norm in its convolution for positions."""
    sizes = encoder_sizes(32, layers=2) | {"conv_dim": (16, 16), "conv_stride": (4, 4)}
    sizes |= {"conv_kernel": (4, 4), "num_conv_pos_embeddings": 16, "vocab_size": VOCAB}
    config = Wav2Vec2Config(num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, **sizes)
    model = qrefta.prepare(build(Wav2Vec2ForCTC, config), rank=2, progress=False)
    model.save_pretrained(tmp_path)
    sound = torch.arange(400.0).sin()[None]
    with torch.no_grad():
        expected = model.eval()(sound).logits
        assert_close(qrefta.load(tmp_path).eval()(sound).logits, expected, rtol=0, atol=0)


def test_factors_that_accelerate_offloaded_are_refused_in_words():
    model = cpu_offload(prepared(tiny_llama, rank=4), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"shared factors are on the meta device.* device_map"):
        logits(model)


def test_loading_within_init_empty_weights_is_refused_in_words(tmp_path):
    prepared(tiny_llama, rank=4).save_pretrained(tmp_path)
    with init_empty_weights(), pytest.raises(ValueError, match="loaded to the meta device"):
        qrefta.load(tmp_path)
