import pytest
import torch
from torch.testing import assert_close

from qrefta.choices import TRANSFORMS
from qrefta.methods import METHODS
from qrefta.methods.refta import ReFTA
from qrefta.nn.bank import FactorBank
from qrefta.nn.factors import Factors
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantized import DenseWeight
from tests.stacks import fit_refta, svd_of, transform_of

all_transforms = pytest.mark.parametrize("transform", TRANSFORMS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def random_stack(seed=0):
    return torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(seed))


def fitted(transform="lsm3", rank=7, dtype=torch.bfloat16):
    stack = random_stack()
    return fit_refta(stack, rank, transform, dtype)


def perturbed(dtype=torch.bfloat16):
    """Factors after some training: masters that are no bf16 values."""
    factors = fitted(dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in factors.trained():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return factors


@all_transforms
@both_dtypes
def test_delta_is_a_sum_over_components(transform, dtype):
    factors = fitted(transform, dtype=dtype)
    for layer in range(4):
        core = factors.core(layer)
        expected = sum(core[c] * torch.outer(factors.A[:, c], factors.B[c]) for c in range(7))
        assert_close(factors.delta(layer), expected.detach())


@all_transforms
def test_delta_is_the_principal_part_of_the_stack(transform):
    stack = random_stack()
    U = transform_of(stack, transform)
    found = svd_of(stack, U, 7)
    expected = torch.einsum(
        "lc,oc,c,ci->loi", U[:, found.slices], found.left, found.values, found.right
    ).float()
    factors = fitted(transform, dtype=torch.float32)
    assert_close(torch.stack([factors.delta(layer) for layer in range(4)]), expected)


@all_transforms
def test_full_rank_delta_is_the_stack(transform):
    factors = fitted(transform, rank=24, dtype=torch.float32)
    assert_close(torch.stack([factors.delta(layer) for layer in range(4)]), random_stack())


def test_core_is_the_transform_column_of_each_component():
    stack = random_stack()
    U = transform_of(stack, "dct")
    slices = svd_of(stack, U, 7).slices
    factors = fit_refta(stack, 7, "dct", torch.bfloat16)
    for layer in range(4):
        assert torch.equal(factors.core(layer), U[layer, slices].float())


def test_both_factors_share_each_singular_value_evenly():
    """Columns of A and rows of B have the same norm, the root of the value."""
    factors = fitted(dtype=torch.float32)
    stack = random_stack()
    values = svd_of(stack, transform_of(stack, "lsm3"), 7).values.float()
    assert_close(factors.A.detach().norm(dim=0), values.sqrt())
    assert_close(factors.B.detach().norm(dim=1), values.sqrt())


@pytest.mark.parametrize("rank", [1, 7, 24])
def test_one_stack_trains_rank_times_in_plus_out(rank):
    factors = fitted(rank=rank)
    assert factors.trained_count == rank * (6 + 10)
    assert factors.trained_count == sum(p.numel() for p in factors.parameters() if p.requires_grad)


@pytest.mark.parametrize("layers", [1, 24])
def test_trained_count_does_not_depend_on_depth(layers):
    """ViT-Large, query or value, R = 15: 30,720 (the paper's 61,440 is both)."""
    assert ReFTA(layers, 1024, 1024, 15, torch.bfloat16).trained_count == 30720


@all_transforms
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_slice_ranks_sum_to_the_rank(transform, rank):
    stack = random_stack()
    factors = fitted(transform, rank)
    slices = svd_of(stack, transform_of(stack, transform), rank).slices
    assert factors.slice_ranks == [(slices == k).sum().item() for k in range(4)]
    assert sum(factors.slice_ranks) == rank


@all_transforms
def test_fitted_masters_are_bf16_values_in_float32(transform):
    for parameter in fitted(transform).trained():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_float32_factors_are_not_rounded():
    assert not any(
        torch.equal(p, p.bfloat16().float()) for p in fitted(dtype=torch.float32).trained()
    )


def test_delta_sees_rounded_masters():
    factors = perturbed()
    up = factors.A.detach().bfloat16().float()
    down = factors.B.detach().bfloat16().float()
    assert_close(factors.delta(2), up @ torch.diag(factors.core(2)) @ down)
    assert (
        factors.delta(2) - factors.A.detach() * factors.core(2) @ factors.B.detach()
    ).abs().max() > 1e-4


def test_rounding_masters_changes_neither_delta_nor_output():
    factors = perturbed()
    layer = AdaptedLinear(10, 6, bias=False, fmt=None, dtype=torch.float32)
    layer.store(DenseWeight(random_stack()[0]), None)
    layer.attach(FactorBank({"stack": factors}), "stack", 0)
    x = random_stack(seed=2)[0]
    delta = factors.delta(0)
    y = layer(x)
    masters = factors.A.detach().clone()
    factors.round_masters()
    assert not torch.equal(factors.A, masters)
    assert torch.equal(factors.A, factors.A.bfloat16().float())
    assert torch.equal(factors.B, factors.B.bfloat16().float())
    assert torch.equal(factors.delta(0), delta)
    assert torch.equal(layer(x), y)


def test_rounding_masters_that_are_not_rounded_changes_nothing():
    factors = perturbed(torch.float32)
    before = factors.A.detach().clone()
    factors.round_masters()
    assert torch.equal(factors.A, before)


@both_dtypes
def test_stored_bytes_are_factors_in_their_dtype_and_a_float32_mix(dtype):
    assert fitted(dtype=dtype).stored_bytes == 7 * (6 + 10) * dtype.itemsize + 4 * 4 * 7


def test_mix_survives_a_dtype_conversion_of_the_model():
    factors = fitted()
    before = factors.core(1).clone()
    assert torch.equal(factors.bfloat16().core(1), before)


def test_trained_numbers_get_gradients_and_the_mix_gets_none():
    factors = fitted()
    (factors.up().sum() + factors.down().sum()).backward()
    assert all(p.grad is not None for p in factors.trained())
    assert not factors.mix.requires_grad
    assert not factors.delta(0).requires_grad


def test_fit_leaves_the_global_seed_alone():
    before = torch.get_rng_state()
    fitted()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_method_is_a_final_subclass():
    assert METHODS["refta"] is ReFTA
    assert all(
        issubclass(method, Factors) and not method.__abstractmethods__
        for method in METHODS.values()
    )
    with pytest.raises(TypeError, match="abstract"):
        Factors(1, 2, 2, 1, torch.bfloat16)
