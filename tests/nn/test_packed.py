"""Code that computes with every weight of a model: right on packed bytes, or refused."""

import copy
import io
import pickle
import warnings
from itertools import cycle, product

import numpy as np
import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import save
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from trl.trainer.callbacks import SyncRefModelCallback

import qrefta
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.packed import PackedBytes, plain_bytes
from qrefta.train.reference import reference_model
from tests.models import build, inputs, logits, prepared, tiny_llama

FORMATS = [
    {"method": "windows", "rank": 8},
    {"method": "windows", "rank": 8, "double_quant": True},
    {"method": "refta", "rank": 8},  # whose mixing weights are bytes too
]


def trained(model, shift):
    """A copy whose factors have moved."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += shift
    return model


def other_llama():
    """With other weights than `tiny_llama`."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.add_(layer.mlp.gate_proj.weight.data)
    return model


def on_states(function):
    """A way to average: `function` on the tensors of two state dicts."""

    def average(one, other):
        model = copy.deepcopy(one)
        first = one.state_dict()
        second = other.state_dict()
        model.load_state_dict({name: function(first[name], second[name]) for name in first})
        return model

    return average


def in_place(function):
    """A way to average: `function` changes each parameter of a copy of the first model."""

    def average(one, other):
        model = copy.deepcopy(one)
        with torch.no_grad():
            for target, source in zip(model.parameters(), other.parameters(), strict=True):
                function(target, source)
        return model

    return average


def by_torch(**options):
    def average(one, other):
        averaged = AveragedModel(one, **options)
        averaged.update_parameters(one)
        averaged.update_parameters(other)
        return averaged.module

    return average


def with_zeros(one, other):
    model = copy.deepcopy(one)
    total = {name: torch.zeros_like(tensor) for name, tensor in one.state_dict().items()}
    for source in (one, other):
        for name, tensor in source.state_dict().items():
            total[name] += tensor / 2
    model.load_state_dict(total)
    return model


def by_foreach(one, other):
    model = copy.deepcopy(one)
    targets = [parameter.detach() for parameter in model.parameters()]
    sources = [parameter.detach() for parameter in other.parameters()]
    torch._foreach_mul_(targets, 0.5)
    torch._foreach_add_(targets, sources, alpha=0.5)
    return model


def by_trl(one, other):
    model = copy.deepcopy(one)
    SyncRefModelCallback._sync_target_model(other, model, 0.5)
    return model


def set_data(target, source):
    target.data = 0.5 * target.data + 0.5 * source.data


AVERAGES = {
    "mean": on_states(lambda one, other: (one + other) / 2),
    "float": on_states(lambda one, other: (one.float() * 0.5 + other.float() * 0.5).to(one.dtype)),
    "stack": on_states(lambda one, other: torch.stack([one, other]).mean(0)),
    "stack, in rows": on_states(lambda one, other: torch.stack([one, other]).mean(0, True)[0]),
    "stack, numpy's words": on_states(
        lambda one, other: torch.stack([one, other]).mean(axis=0, keepdim=True)[0]
    ),
    "sum": on_states(lambda one, other: sum([one, other]) / 2),
    "lerp": on_states(lambda one, other: torch.lerp(one, other, 0.5)),
    "task vectors": on_states(lambda one, other: one + 0.5 * (other - one)),
    "zeros": with_zeros,
    "mul_, add_": in_place(lambda one, other: one.data.mul_(0.5).add_(other.data, alpha=0.5)),
    "two calls": in_place(lambda one, other: (one.mul_(0.5), one.data.add_(other, alpha=0.5))),
    "copy_": in_place(lambda one, other: one.copy_(0.5 * one + 0.5 * other)),
    "sub_": in_place(lambda one, other: one.sub_(0.5 * (one - other))),
    "data": in_place(set_data),
    "foreach": by_foreach,
    "TRL": by_trl,
    "SWA": by_torch(),
    "SWA, function": by_torch(avg_fn=get_swa_avg_fn()),
    "SWA, lists": by_torch(multi_avg_fn=get_swa_multi_avg_fn()),
    "EMA, function": by_torch(avg_fn=get_ema_avg_fn(0.5)),
    "EMA, lists": by_torch(multi_avg_fn=get_ema_multi_avg_fn(0.5)),
}


# every way with the default format, and with one of the others in turn
@pytest.mark.parametrize(
    ("way", "settings"),
    [*product(AVERAGES, FORMATS[:1]), *zip(AVERAGES, cycle(FORMATS[1:]), strict=False)],
    ids=repr,
)
def test_models_of_one_start_are_averaged_exactly(way, settings):
    start = prepared(tiny_llama, **settings)
    averaged = AVERAGES[way](trained(start, 0.25), trained(start, 0.75))
    assert torch.equal(logits(averaged), logits(trained(start, 0.5)))


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_models_of_two_starts_are_not_averaged(average):
    one = prepared(tiny_llama, **FORMATS[0])
    with pytest.raises(ValueError, match=r"of the two models differ.*qrefta\.merge"):
        average(one, prepared(other_llama, **FORMATS[0]))


@pytest.mark.parametrize("convert", [lambda p: p.float(), lambda p: p.to(torch.float32)])
def test_an_average_in_float32_has_its_own_weights(convert):
    """A conversion of any parameter to another dtype is a copy."""
    model = prepared(tiny_llama, **FORMATS[0])
    expected = logits(model)
    packed = [p for p in model.parameters() if not p.is_floating_point()]
    average = [convert(parameter.detach()) for parameter in packed]
    for tensor in average:
        tensor.mul_(0.9)
    assert torch.equal(logits(model), expected)
    for tensor, parameter in zip(average, packed, strict=True):
        parameter.data.copy_(tensor.add_(convert(parameter.detach()), alpha=0.1))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9995, 0.9999])
def test_a_moving_average_of_a_model_that_stays_is_the_model(decay):
    model = prepared(tiny_llama, **FORMATS[0])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for _ in range(20):
        averaged.update_parameters(model)
    assert torch.equal(logits(averaged.module), logits(model))


CHANGES = {
    "clamp_": lambda one, _: one.clamp_(-1, 1),
    "zero_": lambda one, _: one.zero_(),
    "normal_": lambda one, _: nn.init.normal_(one),
    "noise": lambda one, _: one.add_(0.01 * torch.ones(one.shape)),
    "noise on data": lambda one, _: set_noise(one),
    "round": lambda one, _: one.copy_(one.round()),
    "part": lambda one, _: one.data[:4].add_(1),
    "assignment": lambda one, _: one.data.__setitem__(0, 0.5),
    "iadd": lambda one, _: one.data.__iadd__(1),
    "floats": lambda one, _: one.copy_(torch.ones(one.shape)),
    "data of floats": lambda one, _: setattr(one, "data", torch.ones(one.shape)),
    "abs": lambda one, _: one.div_(one.abs().max()),
    "clip": lambda one, other: one.copy_(torch.where(one > other, one, other)),
}


def set_noise(parameter):
    parameter.data = parameter.data + 0.01 * torch.ones(parameter.shape)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_changes_of_packed_bytes_are_refused_and_change_nothing(change):
    model = prepared(tiny_llama, **FORMATS[0])
    layer = next(layer for layer in model.modules() if isinstance(layer, AdaptedLinear))
    before = plain_bytes(layer.weight).clone()
    with torch.no_grad(), pytest.raises(ValueError, match="are bytes, with which nothing can be"):
        change(layer.weight, copy.deepcopy(layer.weight))
    assert torch.equal(plain_bytes(layer.weight), before)


def test_weights_that_were_scaled_are_refused_where_they_are_used_or_saved(tmp_path):
    """Weight decay by hand, on every parameter."""
    model = prepared(tiny_llama, **FORMATS[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1 - 1e-4)
    uses = [
        lambda: logits(model),
        lambda: model.save_pretrained(tmp_path),
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
        lambda: save(model.state_dict()),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"were multiplied by 0\.9999"):
            use()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_sum_with_other_weights_than_one_is_refused_where_it_is_used():
    model = prepared(tiny_llama, **FORMATS[0])
    average = on_states(lambda one, other: 0.4 * one + 0.5 * other)
    with pytest.raises(ValueError, match=r"were multiplied by 0\.9,"):
        logits(average(model, trained(model, 0.1)))


def test_a_reference_that_shares_memory_and_follows_the_model_is_refused():
    """TRL scales the reference first, and with it the weights that the model shares."""
    model = prepared(tiny_llama, **FORMATS[0])
    reference = reference_model(model)
    with pytest.raises(ValueError, match=r"share the memory.*copy\.deepcopy"):
        SyncRefModelCallback._sync_target_model(model, reference, 0.6)


def test_a_state_of_floats_is_refused_in_both_ways_of_loading():
    model = prepared(tiny_llama, **FORMATS[0])
    state = {
        name: torch.from_numpy(np.mean([tensor.numpy(), tensor.numpy()], axis=0)).float()
        for name, tensor in model.state_dict().items()
    }
    with pytest.raises(RuntimeError, match=r"copy_ with torch\.float32 in place of"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match=r"weight was loaded as torch\.float32"):
        model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_loads_by_swapped_tensors(assign):
    model = prepared(tiny_llama, **FORMATS[0])
    other = trained(model, 0.1)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(state, assign=assign)
        floats = {name: plain_bytes(tensor).float() for name, tensor in state.items()}
        with pytest.raises(RuntimeError, match=r"load_state_dict with torch\.float32 in place of"):
            model.load_state_dict(floats, assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(logits(model), logits(other))
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, PackedBytes)


def test_adagrad_takes_all_parameters():
    """It makes a state for every one, and has a step for those with gradients."""
    model = prepared(tiny_llama, **FORMATS[0])
    before = copy.deepcopy(model)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.1)
    model(**inputs(model)).logits.square().sum().backward()
    optimizer.step()
    pairs = list(zip(model.parameters(), before.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs if one.grad is None)
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_all_parameters_as_one_vector_are_refused_and_trainable_ones_not():
    model = prepared(tiny_llama, **FORMATS[0])
    with pytest.raises(ValueError, match=r"cat with torch\.float32"):
        nn.utils.parameters_to_vector(model.parameters())
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vector = nn.utils.parameters_to_vector(factors)
    assert vector.numel() == model.num_parameters(only_trainable=True)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)  # which names no class of qrefta
    other = copy.deepcopy(model)
    other.load_state_dict(state, assign=True)
    return other


def through_folder(model, folder):
    model.save_pretrained(folder)
    return qrefta.load(folder)


@pytest.mark.parametrize("settings", FORMATS, ids=repr)
@pytest.mark.parametrize("way", ["copy", "pickle", "torch", "folder", "dtype", "device"])
def test_bytes_stay_packed_on_every_way(way, settings, tmp_path):
    model = prepared(tiny_llama, **settings)
    ways = {
        "copy": copy.deepcopy,
        "pickle": through_pickle,
        "torch": through_torch,
        "folder": lambda model: through_folder(model, tmp_path),
        "dtype": lambda model: copy.deepcopy(model).to(torch.bfloat16),
        "device": lambda model: copy.deepcopy(model).to("cpu"),
    }
    other = ways[way](model)
    found = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            assert isinstance(found[name], PackedBytes), name
            assert isinstance(found[name], nn.Parameter), name
            assert torch.equal(found[name], parameter)


def test_accelerate_moves_packed_bytes():
    """As its hooks do for a model that a device map offloads."""
    model = prepared(tiny_llama, **FORMATS[0])
    layer = next(layer for layer in model.modules() if isinstance(layer, AdaptedLinear))
    expected = logits(model)
    set_module_tensor_to_device(layer, "weight", "cpu", value=plain_bytes(layer.weight).clone())
    assert isinstance(layer.weight, PackedBytes)
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(logits(model), expected)


def test_a_functional_call_takes_an_average_and_refuses_a_multiple():
    model = prepared(tiny_llama, **FORMATS[0])
    expected = logits(model)
    batch = inputs(model)

    def call(weight, other):
        state = {name: weight * one + other * one for name, one in model.named_parameters()}
        return torch.func.functional_call(model, state, (), batch).logits

    assert torch.equal(call(0.5, 0.5), expected)
    with pytest.raises(ValueError, match=r"were multiplied by 0\.75"):
        call(0.5, 0.25)


def test_the_change_of_every_parameter_can_be_measured():
    model = prepared(tiny_llama, **FORMATS[0])
    other = trained(model, 0.5)
    state = model.state_dict()
    for name, parameter in other.named_parameters():
        change = (parameter - state[name]).abs().max()
        assert (change > 0) == parameter.requires_grad, name


def test_a_dense_model_is_not_touched():
    """16-bit weights are numbers: decay and averages work on them."""
    model = build(type(tiny_llama()), tiny_llama().config)
    model = qrefta.prepare(model, bits=16, rank=8, progress=False)
    expected = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "compute",
    [
        lambda weight: weight.norm(),
        torch.randn_like,
        lambda weight: nn.functional.linear(torch.ones(2, 32), weight),
    ],
    ids=["norm", "randn_like", "linear"],
)
def test_what_torch_refuses_on_bytes_is_refused_in_words(compute):
    """torch says "size mismatch", or names a kernel for 'Char'."""
    layer = prepared(tiny_llama, rank=8).model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=r"are bytes.*requires_grad.*call a layer"):
        compute(layer.weight)


@pytest.mark.parametrize("settings", FORMATS, ids=str)
def test_an_average_of_files_whose_bytes_are_averaged_warns(settings, tmp_path):
    """fairseq's way: whole numbers are summed and divided, and wrap around."""
    model = prepared(tiny_llama, **settings)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state)
    averaged = {
        name: (tensor + tensor) // 2 if not tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    with pytest.warns(UserWarning, match="only floating-point tensors can be averaged"):
        model.load_state_dict(averaged)


def test_a_packed_weight_with_a_parametrization_is_refused():
    model = prepared(tiny_llama, rank=8)
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"was replaced, as torch's parametrize.*qrefta.merge"):
        logits(model)
