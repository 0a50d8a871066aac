import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from qrefta.model.replace import replace_module
from qrefta.model.stacks import ends_with, find_stacks, select_stacks
from qrefta.model.weights import Weights, model_weights, read_weight
from tests.models import (
    ARCHITECTURES,
    TOWERS,
    VOCAB,
    build,
    decoder_sizes,
    tiny_bert,
    tiny_clip,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_segformer,
    tiny_swin,
    tiny_t5,
)

# Linears outside the repeated blocks: heads and poolers. ViT and Swin poolers hold none.
OUTSIDE = {
    "bert": {"bert.pooler.dense", "classifier"},
    "bert_100": {"bert.pooler.dense", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "vit": {"classifier"},
    "gpt2": {"lm_head"},
    "t5": {"lm_head"},
    "whisper": {"proj_out"},
    "clip": {"text_projection", "visual_projection"},
    "siglip": {"text_model.head"}
    | {f"vision_model.head.{part}" for part in ("attention.out_proj", "mlp.fc1", "mlp.fc2")},
    "llama_gqa": {"lm_head"},
    "llama_96": {"lm_head"},
    "qwen3": {"lm_head"},
    "mistral": {"lm_head"},
    "swin": {"classifier"},
    "mixtral": {"lm_head"},
}
MODELS = ARCHITECTURES | TOWERS | {"swin": tiny_swin, "mixtral": tiny_mixtral}


def linears(model):
    return [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]


def shapes(model):
    return {stack.name: stack.shape for stack in find_stacks(model)}


@pytest.mark.parametrize("name", MODELS)
def test_stacks_hold_every_linear_of_the_blocks_once_and_no_other(name):
    model = MODELS[name]()
    found = [path for stack in find_stacks(model) if not stack.experts for path in stack.modules]
    assert sorted(found) == sorted(set(linears(model)) - OUTSIDE[name])


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_read_as_out_by_in_in_layer_order(name):
    """A linear maps the unit vectors to the columns of its weight, however it stores it."""
    model = MODELS[name]()
    for stack in (
        stack for stack in find_stacks(model) if not stack.experts
    ):  # these have separate tests
        modules = [model.get_submodule(path) for path in stack.modules]
        unit, zero = torch.eye(stack.in_features), torch.zeros(1, stack.in_features)
        with torch.no_grad():
            expected = torch.stack([(module(unit) - module(zero)).T for module in modules])
        assert expected.shape == stack.shape
        assert_close(model_weights(model, stack).rows(0, stack.out_features), expected)


def test_names_have_a_star_for_the_layer_number():
    assert shapes(tiny_bert()) == {
        "bert.encoder.layer.*.attention.self.query": (3, 32, 32),
        "bert.encoder.layer.*.attention.self.key": (3, 32, 32),
        "bert.encoder.layer.*.attention.self.value": (3, 32, 32),
        "bert.encoder.layer.*.attention.output.dense": (3, 32, 32),
        "bert.encoder.layer.*.intermediate.dense": (3, 64, 32),
        "bert.encoder.layer.*.output.dense": (3, 32, 64),
    }


def test_grouped_query_attention_has_narrower_keys_and_values():
    found = shapes(tiny_llama(hidden=96))
    assert found["model.layers.*.self_attn.q_proj"] == (3, 96, 96)
    assert found["model.layers.*.self_attn.k_proj"] == (3, 48, 96)
    assert found["model.layers.*.mlp.down_proj"] == (3, 96, 192)


def test_conv1d_is_transposed():
    stacks = find_stacks(tiny_gpt2())
    assert all(stack.transposed for stack in stacks)
    assert [stack.shape for stack in stacks] == [
        (3, 96, 32),
        (3, 32, 32),
        (3, 128, 32),
        (3, 32, 128),
    ]
    assert not any(stack.transposed for stack in find_stacks(tiny_bert()))


def test_t5_keeps_sublayer_numbers_and_encoder_apart_from_decoder():
    found = shapes(tiny_t5())
    assert found["encoder.block.*.layer.0.SelfAttention.q"] == (3, 32, 32)
    assert found["encoder.block.*.layer.1.DenseReluDense.wi"] == (3, 64, 32)
    assert found["decoder.block.*.layer.1.EncDecAttention.k"] == (2, 32, 32)
    assert found["decoder.block.*.layer.2.DenseReluDense.wo"] == (2, 32, 64)


def test_towers_are_stacks_of_their_own():
    queries = [stack for stack in find_stacks(tiny_clip()) if stack.name.endswith("q_proj")]
    assert [stack.shape for stack in queries] == [(2, 32, 32), (2, 64, 64)]
    assert [stack.name.split(".")[0] for stack in queries] == ["text_model", "vision_model"]


def test_swin_stages_of_different_width_are_different_stacks():
    queries = [stack for stack in find_stacks(tiny_swin()) if stack.name.endswith("q_proj")]
    assert [stack.shape for stack in queries] == [(2, 32, 32), (2, 64, 64)]
    assert queries[1].modules == tuple(
        f"swin.encoder.layers.1.blocks.{block}.attention.q_proj" for block in range(2)
    )


def test_layer_two_comes_before_layer_ten():
    stack = find_stacks(tiny_bert(layers=12))[0]
    assert stack.modules == tuple(f"bert.encoder.layer.{i}.attention.self.query" for i in range(12))
    assert stack.layers == 12


def test_one_block_is_a_stack_of_one():
    found = shapes(tiny_bert(layers=1))
    assert found["bert.encoder.layer.*.attention.self.query"] == (1, 32, 32)
    assert len(found) == 6


def test_lists_in_a_task_head_are_no_blocks():
    """SegFormer's decode_head.linear_projections; DETR's bbox_predictor and MusicGen's lm_heads are
    the same.
    """
    assert not any(name.startswith("decode_head") for name in shapes(tiny_segformer()))


def test_multihead_attention_projection_is_left_out():
    """`nn.MultiheadAttention` reads the weight of its out_proj and never calls it."""

    def block():
        return nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "mlp": nn.Linear(32, 32)})

    model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
    assert "layers.0.attention.out_proj" in linears(model)
    assert shapes(model) == {"layers.*.mlp": (2, 32, 32)}


def test_weights_that_their_parent_reads_are_left_out():
    """torch's encoder layer hands linear1.weight to a fused kernel; Mamba multiplies with
    dt_proj.weight.
    """
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64), 3, enable_nested_tensor=False
    )
    assert shapes(model) == {}
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    roles = {name.rpartition(".")[2] for name in shapes(build(MambaForCausalLM, config))}
    assert roles == {"in_proj"}  # its CUDA path reads the weights of x_proj and out_proj too


def test_falcons_own_linear_class_is_a_plain_linear():
    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    roles = {name.rpartition(".")[2] for name in shapes(build(FalconForCausalLM, config))}
    assert roles == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_a_list_of_bare_linears_is_no_run_of_blocks():
    model = nn.ModuleDict(
        {"mlp": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})}
    )
    assert shapes(model) == {}


def test_places_in_a_sequential_mlp_are_no_layer_numbers():
    blocks = [
        nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
        for _ in "ab"
    ]
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList(blocks), "head": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}
    )
    assert shapes(model) == {"blocks.*.1.0": (2, 8, 8), "blocks.*.1.2": (2, 8, 8)}


def test_hybrid_blocks_in_one_list_make_stacks_of_their_own():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)

    class StateSpace(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(8, 4)

    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([StateSpace(), Attention(), StateSpace(), Attention()])}
    )
    assert [stack.modules for stack in find_stacks(model)] == [
        ("blocks.0.mix", "blocks.2.mix"),
        ("blocks.1.q", "blocks.3.q"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_layers_are_float32_copies(dtype):
    model = tiny_bert().to(dtype)
    stack = find_stacks(model)[0]
    weights = model_weights(model, stack)
    expected = torch.stack(
        [model.get_submodule(path).weight.detach().float() for path in stack.modules]
    )
    for read in (weights, Weights.of(expected)):
        rows, layer = read.rows(3, 9), read.layer(1)
        assert torch.equal(rows, expected[:, 3:9])
        assert torch.equal(layer, expected[1])
        rows.zero_()
        layer.zero_()
    assert expected[1].count_nonzero() > 0
    assert model.get_submodule(stack.modules[1]).weight.count_nonzero() > 0


def test_read_weight_is_a_view_without_gradient():
    module = tiny_gpt2().transformer.h[0].mlp.c_fc
    weight = read_weight(module)
    assert weight.data_ptr() == module.weight.data_ptr()
    assert not weight.requires_grad


def test_replace_module_reaches_every_owner_of_a_shared_module():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict(
        {"a": nn.Sequential(shared), "b": nn.ModuleDict({"again": shared}), "c": nn.Linear(2, 2)}
    )
    new = nn.Identity()
    replace_module(model, "a.0", new)
    assert model["a"][0] is new
    assert model["b"]["again"] is new
    assert type(model["c"]) is nn.Linear


def test_replace_module_reaches_plain_containers():
    """Code may run layers out of a list that is no `nn.ModuleList`."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model.run = [model["a"], nn.ReLU(), model["a"]]
    model.pair = (model["a"], model["b"])
    model.named = {"first": model["a"]}
    model.__dict__["alias"] = model["a"]
    run = model.run
    new = nn.Identity()
    replace_module(model, "a", new)
    assert model.run is run
    assert run[0] is run[2] is model.pair[0] is model.named["first"] is model.alias is new
    assert model.pair[1] is model["b"]
    assert {name for name, _ in model.named_modules()} == {"", "a", "b"}


def test_replace_module_reaches_both_names_in_one_parent():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"key": shared, "value": shared})
    replace_module(model, "key", nn.Identity())
    assert model["key"] is model["value"]


@pytest.mark.parametrize(
    ("targets", "roles"),
    [
        (["query", "value"], ["self.query", "self.value"]),
        (["output.dense"], ["attention.output.dense", "output.dense"]),
        (["attention.output.dense"], ["attention.output.dense"]),
        (r".*\.(query|key)", ["self.query", "self.key"]),
        (r"bert\.encoder\.layer\.\d+\.intermediate\.dense", ["intermediate.dense"]),
    ],
)
def test_targets_are_path_ends_or_an_expression_for_whole_paths(targets, roles):
    chosen = select_stacks(find_stacks(tiny_bert()), targets)
    assert len(chosen) == len(roles)
    assert all(stack.name.endswith(role) for stack, role in zip(chosen, roles, strict=True))


def test_no_targets_means_all_stacks():
    stacks = find_stacks(tiny_bert())
    assert select_stacks(stacks, None) == stacks


def test_a_name_matches_whole_path_parts_only():
    assert ends_with("a.out_proj", "out_proj")
    assert not ends_with("a.out_proj", "proj")
    with pytest.raises(ValueError, match="proj"):
        select_stacks(find_stacks(tiny_llama()), ["proj"])


@pytest.mark.parametrize("targets", [["query", "q_proj"], "q_proj", "query", ["query", ""], []])
def test_targets_that_match_nothing_are_refused_with_the_available_names(targets):
    """One bad name among good ones is refused too; an expression must match the whole path."""
    with pytest.raises(
        ValueError,
        match=r"match.* no linear layer; the stacks are: bert\.encoder\.layer\.\*\.attention",
    ):
        select_stacks(find_stacks(tiny_bert()), targets)


@pytest.mark.parametrize(
    ("target", "hint"), [("all-linear", "leave target_modules out"), ("query", r"\['query'\]")]
)
def test_a_text_that_matches_nothing_is_told_what_to_write(target, hint):
    with pytest.raises(ValueError, match=hint):
        select_stacks(find_stacks(tiny_bert()), target)


def test_a_gate_with_one_output_stays_dense():
    """Qwen2-MoE's gate of its shared expert would limit the rank of all stacks to its layers."""
    sizes = decoder_sizes(32) | {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    }
    model = build(Qwen2MoeForCausalLM, Qwen2MoeConfig(**sizes))
    assert model.model.layers[0].mlp.shared_expert_gate.out_features == 1
    roles = {stack.name for stack in find_stacks(model)}
    assert "model.layers.*.mlp.shared_expert.up_proj" in roles
    assert not any("shared_expert_gate" in role for role in roles)


def test_the_name_that_matches_nothing_is_named():
    with pytest.raises(ValueError, match="'q_proj' matches no linear"):
        select_stacks(find_stacks(tiny_bert()), ["query", "q_proj"])


@pytest.mark.parametrize(
    "targets", [["layer.0.attention.self.query"], r".*\.1\.attention\.self\.query"]
)
def test_some_layers_of_a_stack_are_no_target(targets):
    """The factors are shared: all layers, or none."""
    with pytest.raises(
        ValueError, match=r"1 of the 3 layers of bert\.encoder\.layer\.\*\.attention\.self\.query"
    ):
        select_stacks(find_stacks(tiny_bert()), targets)


def test_broken_expression_is_refused():
    with pytest.raises(ValueError, match="not a regular expression"):
        select_stacks(find_stacks(tiny_bert()), "(query")


def test_model_without_blocks_is_refused():
    assert find_stacks(nn.Linear(2, 2)) == []
    with pytest.raises(ValueError, match="no linear layers in repeated blocks"):
        select_stacks([], None)
