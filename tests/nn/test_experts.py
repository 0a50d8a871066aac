"""Mixture-of-experts models: their fused experts are slices of a stack."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, MixtralForCausalLM, PretrainedConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import qrefta
from qrefta._compat.transformers import enable_checkpointing
from qrefta.files.verify import SWITCH
from qrefta.linalg.metric import output_error
from qrefta.model.stacks import find_stacks, select_stacks
from qrefta.model.weights import model_weights
from qrefta.nn.experts import add_expert, fused_names, is_experts, restore_fused, route_evenly
from qrefta.nn.linear import AdaptedLinear
from qrefta.split.calibrate import gather_moments
from tests import models
from tests.models import EXPERTS, VOCAB, header_and_data, inputs, logits, tiny_mixtral

all_models = pytest.mark.parametrize("name", EXPERTS)
MODULES = [MixtralExperts, GptOssExperts, AriaExperts, NemotronHExperts, MuseSparkExperts]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prepared(name, **options):
    return models.prepared(EXPERTS[name], **({"rank": 6} | options))


def rows(model):
    return model.config.quantization_config.stacks


def moved(model):
    """Factors as training leaves them."""
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.02 * randn(*parameter.shape, seed=seed)
    return model


def dense_weights(model):
    """Every replaced weight by its name in the original model, differentiable in the factors."""
    found = {}
    for row in rows(model):
        layers = [model.get_submodule(path) for path in row.stack.adapted]
        weights = []
        for layer in layers:
            weights.append(layer.residual(torch.float32))
            if layer.factors is not None:
                core = torch.diag(layer.factors.core(layer._adapter[2]))
                weights[-1] = weights[-1] + layer.factors.up() @ core @ layer.factors.down()
        if not row.stack.experts:
            found |= {
                f"{path}.weight": weight
                for path, weight in zip(row.stack.modules, weights, strict=True)
            }
            continue
        for block, path in enumerate(row.stack.modules):
            fused = torch.stack(
                weights[block * row.stack.experts : (block + 1) * row.stack.experts]
            )
            found[path] = fused.mT if row.stack.transposed else fused
    return found


# The experts modules of transformers


def experts_module(module_class):
    """A module with 4 experts of 8 -> 12 -> 8, and a batch in which no token chose expert 2."""
    config = PretrainedConfig(
        # The names of several architectures.
        num_local_experts=4,
        num_experts=4,
        n_routed_experts=4,
        moe_num_experts=4,
        hidden_size=8,
        moe_hidden_size=8,
        intermediate_size=12,
        moe_intermediate_size=12,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_alpha=1.7,
        swiglu_limit=7.0,
        post_norm_eps=1e-6,
        experts_implementation="eager",
    )
    experts = module_class(config)
    with torch.no_grad():
        for seed, parameter in enumerate(experts.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
    index = torch.tensor([[0, 1], [3, 0], [1, 3], [3, 1], [0, 3]])
    return experts, (randn(5, 8, seed=9), index, randn(5, 2, seed=10).softmax(1))


@pytest.mark.parametrize("module_class", MODULES)
def test_the_pass_through_layers_equals_the_fused_pass(module_class):
    """With and without gate, bias, transposition and norm.

    The fused parameters come back as they were.
    """
    experts, batch = experts_module(module_class)
    assert is_experts(experts)
    expected = experts(*batch)
    names = fused_names(experts)
    weights = {}
    for name in names:
        weights[name] = getattr(experts, name).detach()
        for weight in weights[name]:
            linear = nn.Linear(1, 1, bias=False)
            linear.weight = nn.Parameter(weight.T if experts.is_transposed else weight)
            add_expert(experts, name, linear)
        assert not hasattr(experts, name)
    assert experts.config._experts_implementation == "qrefta"
    assert_close(experts(*batch), expected)
    for name in names:
        slices = (weight.T if experts.is_transposed else weight for weight in weights[name])
        restore_fused(experts, name, slices, torch.float32)
        assert torch.equal(getattr(experts, name), weights[name])
    assert_close(experts(*batch), expected)


def test_tokens_that_are_dealt_out_reach_all_experts_alike():
    """Ten of them to four experts, whatever the router chose."""
    experts, batch = experts_module(MixtralExperts)
    layers = []
    for name in fused_names(experts):
        for weight in getattr(experts, name).detach():
            layers.append(nn.Linear(*weight.T.shape, bias=False))
            add_expert(experts, name, layers[-1])
    route_evenly(experts)
    counts = []
    for linear in layers:
        linear.register_forward_hook(lambda _, args, __: counts.append(len(args[0])))
    experts(*batch)
    assert sorted(counts) == [2, 2, 2, 2, 3, 3, 3, 3]


# Stacks


@all_models
def test_a_fused_parameter_is_as_many_slices_as_there_are_experts(name):
    model = EXPERTS[name]()
    experts = 12 if name == "qwen3_moe" else 4
    stacks = {stack.name.split("*.")[-1]: stack for stack in find_stacks(model)}
    for role in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        stack = stacks[role]
        assert (stack.experts, stack.layers) == (experts, 2 * experts)
        found = model_weights(model, stack).rows(0, stack.out_features)
        fused = torch.cat([model.get_parameter(path) for path in stack.modules])
        assert torch.equal(found, fused.mT if stack.transposed else fused)
        assert torch.equal(model_weights(model, stack).layer(5), found[5])
    assert stacks["mlp.experts.down_proj"].out_features == 32


def test_experts_are_targets_by_their_parameters():
    stacks = find_stacks(tiny_mixtral())
    roles = [
        stack.name.rpartition("*.")[2]
        for stack in select_stacks(stacks, ["q_proj", "experts.down_proj"])
    ]
    assert roles == ["self_attn.q_proj", "mlp.experts.down_proj"]
    (stack,) = select_stacks(stacks, r".*\.experts\.gate_up_proj")
    assert stack.layers == 8
    with pytest.raises(
        ValueError, match=r"1 of the 2 layers of model\.layers\.\*\.mlp\.experts\.down_proj"
    ):
        select_stacks(stacks, ["0.mlp.experts.down_proj"])


# Prepared


@all_models
def test_only_routers_and_norms_of_the_blocks_stay_dense(name):
    model = prepared(name, target_modules=("q_proj",))
    left = {path for path, p in model.model.layers.named_parameters() if p.is_floating_point()}
    kept = ("norm", "mlp.gate.", "mlp.router.", "sinks", "bias")
    assert not {path for path in left if not any(part in path for part in kept)}
    factors = {
        path
        for path, m in model.named_modules()
        if isinstance(m, AdaptedLinear) and m.factors is not None
    }
    assert factors == {path for path in factors if path.endswith("q_proj")} != set()
    assert all(row.rank == 0 for row in rows(model) if row.stack.experts)


@all_models
def test_bits_16_keep_the_function(name):
    original = EXPERTS[name]()
    model = prepared(name, bits=16)
    assert_close(logits(model), logits(original), rtol=1e-5, atol=1e-5)
    adapted = next(row for row in rows(model) if row.stack.experts).stack.adapted
    assert model.get_submodule(adapted[5]).factors.delta(5).any()


@all_models
def test_4_bits_differ_by_the_stated_error_and_no_more(name):
    original = dict(EXPERTS[name]().named_parameters())
    model = prepared(name)
    dense = dense_weights(model)
    for row, report in zip(rows(model), qrefta.quant_report(model), strict=True):
        names = (
            row.stack.modules
            if row.stack.experts
            else [f"{path}.weight" for path in row.stack.modules]
        )
        error = sum((original[key] - dense[key]).double().square().sum().item() for key in names)
        assert report["residual_error"] == pytest.approx(error, rel=1e-4)
        assert report["ratio"] < 1
        assert (report["experts"], report["layers"]) == (
            row.stack.experts,
            len(row.stack.modules) * max(row.stack.experts, 1),
        )


@all_models
def test_logits_and_gradients_are_the_dense_definitions(name):
    """The gradients of all experts add up in the shared factors.

    Factors are float32: rounding has no derivative to compare with.
    """
    model = moved(prepared(name, factor_dtype="float32"))
    original = EXPERTS[name]()
    batch = inputs(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = model(**batch).logits
    expected = functional_call(original, dense_weights(model), kwargs=batch).logits
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(
        *(torch.autograd.grad(y.square().mean(), trained) for y in (found, expected)), strict=True
    ):
        assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("method", ["craft", "tera"])
def test_other_methods_keep_the_function_too(method):
    model = prepared("mixtral", method=method, rank=3, bits=16)
    assert_close(logits(model), logits(tiny_mixtral()), rtol=1e-5, atol=1e-5)


def test_checkpointing_changes_no_bit():
    model = moved(prepared("mixtral")).train()
    batch = inputs(tiny_mixtral())
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        return torch.autograd.grad(model(**batch, use_cache=False).logits.square().mean(), trained)

    expected = gradients()
    enable_checkpointing(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def test_a_compiled_block_has_the_same_gradients_and_does_not_recompile():
    """Experts are not compiled: the number of tokens of each differs in every step."""
    block = moved(prepared("mixtral", target_modules=("experts.down_proj",))).model.layers[0].mlp
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager")
    factors = block.experts.down_proj_adapted[0].factors
    graphs = []
    for seed in range(3):
        x = randn(2, 9, 32, seed=seed).requires_grad_()
        leaves = [x, *factors.trained()]
        found, expected = (
            torch.autograd.grad(module(x).square().sum(), leaves) for module in (compiled, block)
        )
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0
    torch.compiler.reset()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@all_models
def test_another_implementation_leaves_the_adapted_pass_and_comes_with_merging(
    name, implementation
):
    """transformers writes the name into the model's config; generate does so too."""
    model = prepared(name)
    expected = logits(model)
    model.set_experts_implementation(implementation)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    merged = qrefta.merge(model, dtype=torch.float32)
    assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert merged.config._experts_implementation == implementation
    assert all(module.config is merged.config for module in merged.modules() if is_experts(module))


def test_a_dense_model_of_the_same_config_computes_as_before():
    """The config chooses the forward pass of experts, also in a model without adapted experts."""
    model = prepared("mixtral")
    dense = tiny_mixtral()
    fresh = MixtralForCausalLM(copy.deepcopy(model.config)).eval()
    fresh.load_state_dict(dense.state_dict())
    assert_close(logits(fresh), logits(dense))


# Saved, loaded, merged


@all_models
def test_round_trip(name, tmp_path):
    model = moved(prepared(name, double_quant=True, target_modules=("q_proj", "experts.down_proj")))
    model.save_pretrained(tmp_path / "first", max_shard_size="100KB")
    loaded = qrefta.load(tmp_path / "first")
    state = loaded.state_dict()
    reference = model.state_dict()
    assert set(state) == set(reference)
    assert all(torch.equal(state[key], tensor) for key, tensor in reference.items())
    trains = [
        {key for key, p in one.named_parameters() if p.requires_grad} for one in (loaded, model)
    ]
    assert trains[0] == trains[1]
    # Not to the bit: products of very few tokens depend on where a tensor starts, and files align
    # to 8 bytes.
    assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert_close(logits(copy.deepcopy(loaded)), logits(model), rtol=1e-5, atol=1e-5)
    assert qrefta.quant_report(loaded) == qrefta.quant_report(model)
    loaded.save_pretrained(tmp_path / "second", max_shard_size="100KB")
    for file in (tmp_path / "first").glob("*.safetensors"):
        assert header_and_data(tmp_path / "second" / file.name) == header_and_data(file)


def test_rows_name_fused_parameters_and_not_every_expert(tmp_path):
    prepared("mixtral").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["stacks"]
    row = next(row for row in saved if row["stack"]["name"].endswith("experts.down_proj"))
    assert row["stack"]["modules"] == [
        f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)
    ]
    assert row["stack"]["experts"] == 4


def test_the_base_model_loads_from_a_checkpoint_with_a_head(tmp_path):
    model = prepared("mixtral")
    model.save_pretrained(tmp_path)
    base = type(model.model).from_pretrained(tmp_path)
    ids = inputs(model)["input_ids"]
    with torch.no_grad():
        assert_close(
            base(ids).last_hidden_state, model.model(ids).last_hidden_state, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("damage", ["a tensor less", "other experts"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path, monkeypatch):
    """Checksums would find any damage first: this is for the other checks."""
    monkeypatch.setenv(SWITCH, "0")
    prepared("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if damage == "other experts":
        config["num_local_experts"] = 5
        (tmp_path / "config.json").write_text(json.dumps(config))
        message = r"experts.gate_up_proj has the shape \[5, 128, 32\]"
    else:
        drop_tensor(tmp_path / "model.safetensors", "gate_up_proj_adapted.2.absmax")
        message = "1 tensors .* are missing"
    with pytest.raises(ValueError, match=message):
        qrefta.load(tmp_path)


def test_a_missing_bias_is_refused_by_other_classes_too(tmp_path, monkeypatch):
    """They may have new heads, but transformers initializes no module without fused parameters."""
    model = prepared("gpt_oss")
    model.save_pretrained(tmp_path)
    monkeypatch.setenv(SWITCH, "0")
    drop_tensor(tmp_path / "model.safetensors", "1.mlp.experts.down_proj_bias")
    with pytest.raises(ValueError, match=r"1 tensors .* are missing"):
        type(model.model).from_pretrained(tmp_path)


def drop_tensor(path, end):
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith(end))]
    save_file(tensors, path, {"format": "pt"})


@all_models
def test_merged_experts_are_fused_again_and_load_plainly(name, tmp_path):
    model = moved(prepared(name, factor_dtype="float32"))
    original = EXPERTS[name]()
    expected = logits(model)
    dense = {key: tensor.detach() for key, tensor in dense_weights(model).items()}
    merged = qrefta.merge(model, dtype=torch.float32)
    state = merged.state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {
        key: tensor.shape for key, tensor in original.state_dict().items()
    }
    for key, tensor in dense.items():
        assert_close(state[key], tensor, rtol=1e-6, atol=1e-6)
    assert {path: type(m) for path, m in merged.named_modules()} == {
        path: type(m) for path, m in original.named_modules()
    }
    assert merged.config._experts_implementation == original.config._experts_implementation
    assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    original.save_pretrained(tmp_path / "original")
    assert tensor_names(tmp_path / "merged") == tensor_names(tmp_path / "original")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(plain), logits(merged), rtol=1e-5, atol=1e-5)


def tensor_names(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_merging_rounds_once_to_bf16_and_prepares_again():
    model = prepared("mixtral")
    dense = {key: tensor.detach() for key, tensor in dense_weights(model).items()}
    merged = qrefta.merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    key = "model.layers.1.mlp.experts.down_proj"
    assert_close(merged.get_parameter(key), dense[key].bfloat16())
    qrefta.prepare(merged, rank=3)
    assert logits(merged).isfinite().all()


# Calibrated


def masked_batch():
    ids = torch.randint(2, VOCAB, (3, 10), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(10)[None] < torch.tensor([[10], [6], [3]])).long()
    return {"input_ids": ids, "attention_mask": mask}


@all_models
def test_moments_belong_to_the_inputs_of_the_experts(name):
    """First weights see each token once, second weights see it once for each of its experts."""
    model = EXPERTS[name]()
    batch = masked_batch()
    moments = gather_moments(model, find_stacks(model), [batch], progress=False)
    seen = {}
    for path, module in model.named_modules():
        if is_experts(module):
            module.register_forward_pre_hook(
                lambda module, args, path=path: seen.update({path: (module, args)})
            )
    with torch.no_grad():
        model(**batch)
    assert len(seen) == 2
    for path, (module, (hidden, index, _)) in seen.items():
        first = []
        second = []
        for token in batch["attention_mask"].reshape(-1).nonzero().flatten():
            first.append(hidden[token])
            for expert in index[token]:
                weight = module.gate_up_proj[expert].detach()
                product = hidden[token] @ (weight if module.is_transposed else weight.T)
                bias = module.gate_up_proj_bias[expert].detach() if module.has_bias else 0
                second.append(module._apply_gate(product + bias))
        for key, tokens in (("gate_up_proj", first), ("down_proj", second)):
            x = torch.stack(tokens).double()
            expected = (x.T @ x / len(x)).float()
            assert_close(
                moments.of(f"{path}.{key}"),
                expected,
                rtol=1e-4,
                atol=1e-5 * expected.abs().max().item(),
            )


def test_calibrated_experts_state_the_error_of_their_outputs():
    original = tiny_mixtral()
    moments = gather_moments(original, find_stacks(original), [masked_batch()], progress=False)
    model = qrefta.prepare(tiny_mixtral(), method="refta", rank=6, refine=2, moments=moments)
    dense = dense_weights(model)
    for row in rows(model):
        if row.stack.experts:
            errors = [
                (original.get_parameter(path) - dense[path], moments.of(path))
                for path in row.stack.modules
            ]
            stated = sum(
                output_error(expert, moment)
                for error, moment in errors
                for expert in error.detach()
            )
            assert row.output_error == pytest.approx(stated, rel=1e-4)
            assert row.output_ratio < 1
