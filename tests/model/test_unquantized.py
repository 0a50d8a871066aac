"""Weights in the blocks that stay in 16 bits: which, how many, and why."""

import warnings

import pytest
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

import qrefta
from qrefta._compat.transformers import WeightRenaming
from qrefta.model.stacks import find_stacks
from qrefta.model.unquantized import unquantized
from tests.models import ARCHITECTURES, VOCAB, build, tiny_llama, tiny_mixtral


def tiny_mamba():
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    return build(MambaForCausalLM, config)


def tiny_bloom(**settings):
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **settings)
    return build(BloomForCausalLM, config)


def kept(model):
    return unquantized(model, find_stacks(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_stays_in_16_bits(architecture):
    assert kept(ARCHITECTURES[architecture]()).share == 0


def test_all_of_blooms_layers_are_packed_unless_it_reads_their_slices():
    assert kept(tiny_bloom()).share == 0
    model = tiny_bloom(pretraining_tp=2, slow_but_exact=True)
    roles = {layer.role.rpartition(".")[2] for layer in kept(model).layers}
    assert roles == {"dense", "dense_4h_to_h"}


def test_layers_that_stay_have_their_number_and_reason():
    found = {layer.role.rpartition(".")[2]: layer for layer in kept(tiny_mamba()).layers}
    assert found.keys() == {"x_proj", "dt_proj", "out_proj"}
    assert found["out_proj"].weights == 2 * 64 * 32
    assert found["out_proj"].reason == "other code of the model reads the weight"
    in_proj = 2 * 128 * 32
    others = sum(layer.weights for layer in found.values())
    assert kept(tiny_mamba()).share == others / (others + in_proj)


def test_experts_with_code_of_their_model_count():
    model = tiny_mixtral()
    experts = [stack for stack in find_stacks(model) if stack.experts]
    others = [stack for stack in find_stacks(model) if not stack.experts]
    found = unquantized(model, others)
    assert {layer.role for layer in found.layers} == {stack.name for stack in experts}
    assert found.share > 0.5


@pytest.mark.parametrize(("pattern", "lost"), [(r"\.up_proj$", False), (r"\.up_proj", True)])
def test_a_layer_whose_scales_would_be_lost_stays(pattern, lost, monkeypatch):
    """Inkling's checkpoints hold `sconv.weight_proj` for the weight of the layer of that name."""
    model = tiny_llama()
    renamings = [
        WeightRenaming(r"\.ffn\.", r".mlp."),
        WeightRenaming(pattern, r".up_proj.weight"),
    ]
    model._weight_conversions = renamings
    monkeypatch.setattr("qrefta.model.names.get_model_conversion_mapping", lambda _: renamings)
    found = {layer.role: layer.reason for layer in kept(model).layers}
    reason = "transformers renames it in checkpoints in a way that loses its scales"
    assert found == ({"model.layers.*.mlp.up_proj": reason} if lost else {})


def test_a_block_without_a_second_of_its_kind_is_named():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 4))

    class Another(Other):
        pass

    model = nn.ModuleDict({"layers": nn.ModuleList([Other(), Another()])})
    reasons = {layer.reason for layer in kept(model).layers}
    assert reasons == {"its block has no second of its kind"}


def test_preparing_says_what_stays_in_16_bits(tmp_path):
    model = tiny_mamba()
    model.save_pretrained(tmp_path / "dense")
    told = (
        r"(?s)of the weights in the model's blocks stay in 16 bits.*out_proj, 4,096 weights: other"
    )
    with pytest.warns(UserWarning, match=told):
        qrefta.prepare(model, rank=2, progress=False)
    with pytest.warns(UserWarning, match=told):
        qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "out", rank=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qrefta.prepare(tiny_llama(), rank=2, progress=False)
