"""Every tensor method: compared with dense definitions, prepared, saved, merged and trained."""

import copy
import re
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pytest
import tensorly
import torch
from tensorly.tenalg import multi_mode_dot
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import qrefta
from qrefta._compat.transformers import enable_checkpointing
from qrefta.config.rank import RankBudget
from qrefta.config.stack import BANK
from qrefta.linalg.metric import Metric
from qrefta.linalg.tucker import hosvd
from qrefta.methods import METHODS
from qrefta.methods.craft import CRAFT
from qrefta.methods.tera import kronecker_product, mode_sizes
from qrefta.methods.windows import Windows
from qrefta.model.stacks import find_stacks
from qrefta.model.weights import model_weights
from qrefta.nn.bank import FactorBank
from qrefta.nn.factors import stored_factors
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantized import DenseWeight
from qrefta.split.calibrate import gather_moments
from tests import models
from tests.models import ARCHITECTURES, covered, inputs, logits
from tests.stacks import slices_of, transform_of

RANKS = {
    "refta": {"rank": 5},
    "craft": {"rank": (2, 5, 6)},
    "tera": {"rank": 4},
    "lotr": {"rank": 4},
    "lorta": {"rank": 4},
    "windows": {"rank": 10},
}
ZERO = ["tera", "lotr", "lorta", "windows"]
all_methods = pytest.mark.parametrize("method", METHODS)
zero_methods = pytest.mark.parametrize("method", ZERO)


def stack_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fitted(method, stack, rank, dtype=torch.bfloat16, seed=0):
    U = transform_of(stack, "lsm3" if METHODS[method].fits else "identity")
    return METHODS[method].fit(slices_of(stack, U), rank, U, dtype, seed).factors


def rank_of(method):
    return RANKS[method]["rank"]


def moved(factors, size=0.1, seed=1):
    """Factors after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factors.trained():
            parameter += size * torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
    return factors


def prepared(architecture, method, steps=False, **options):
    model = models.prepared(ARCHITECTURES[architecture], method=method, **RANKS[method] | options)
    if steps:
        for factors in getattr(model, BANK).values():
            moved(factors)
    return model


# The update, by its definition


def dense_refta(f, layer):
    return f.A @ torch.diag(f.core(layer).to(f.A)) @ f.B


def dense_craft(f, layer):
    layers = f.mix.view(torch.float32).to(f.cores)
    squares = [torch.eye(len(square), dtype=square.dtype) + square for square in f.trained()]
    mixed = torch.einsum("k,koi->oi", (layers @ squares[0])[layer], f.cores)
    return (f.left @ squares[1]) @ mixed @ (f.right.T @ squares[2]).T


def dense_tera(f, layer):
    a_1, a_2, b_1, b_2 = f.scales[layer]
    outer, cores, inner = zip(
        *(
            mode.split([out, f.rank, into])
            for mode, (out, into) in zip((f.mode_1, f.mode_2), f.sizes, strict=True)
        ),
        strict=True,
    )
    a = torch.kron(a_1, 1 + a_2)
    b = torch.kron(1 + b_1, 1 + b_2)
    whole = (
        torch.kron(*outer)
        @ torch.diag(a)
        @ torch.kron(*cores)
        @ torch.diag(b)
        @ torch.kron(*inner).T
    )
    return whole[: f.out_features, : f.in_features]


def dense_lotr(f, layer):
    return f.L @ f.G[layer] @ f.R


def dense_lorta(f, layer):
    return torch.einsum("or,r,ri->oi", f.A, 1 + f.C[layer], f.B)


def dense_windows(f, layer):
    """Every component has the mix 1 in its layers and 0 in the others."""
    mix = torch.zeros(f.rank, dtype=f.A.dtype)
    mix[f.window(layer)] = 1
    return torch.einsum("or,r,ri->oi", f.A, mix, f.B)


DENSE = {
    "refta": dense_refta,
    "craft": dense_craft,
    "tera": dense_tera,
    "lotr": dense_lotr,
    "lorta": dense_lorta,
    "windows": dense_windows,
}


@all_methods
@pytest.mark.parametrize("tokens", [3, 40, 600])
@pytest.mark.parametrize("shape", [(3, 12, 20), (1, 13, 17), (2, 20, 7)])
def test_output_and_gradients_are_the_dense_definitions(method, tokens, shape):
    """In float64, for x and every trainable parameter.

    Odd and prime sizes, one layer, more tokens than features.
    """
    stack = stack_of(*shape, dtype=torch.float64)
    factors = moved(fitted(method, stack, rank_of(method), torch.float64))
    layer = AdaptedLinear(shape[2], shape[1], bias=True, fmt=None, dtype=torch.float64)
    layer.store(DenseWeight(stack[0]), stack_of(shape[1], seed=4, dtype=torch.float64))
    layer.attach(FactorBank({"stack": factors}), "stack", shape[0] - 1)
    x = stack_of(tokens, shape[2], seed=2, dtype=torch.float64)
    grad = stack_of(tokens, shape[1], seed=3).double()
    leaves = [x.requires_grad_(), *factors.trained()]
    y = layer(x)
    expected = nn.functional.linear(x, stack[0] + DENSE[method](factors, shape[0] - 1), layer.bias)
    assert_close(y, expected)
    for found, wanted in zip(
        torch.autograd.grad(y, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        assert wanted.abs().max() > 0 or len(wanted) == 0
        assert_close(found, wanted)


@all_methods
def test_delta_is_the_dense_definition_of_rounded_numbers_in_any_rows(method):
    factors = moved(fitted(method, stack_of(3, 24, 20), rank_of(method)))
    rounded = copy.deepcopy(factors)
    rounded.round_masters()
    for layer in range(3):
        expected = DENSE[method](rounded, layer).detach()
        assert_close(factors.delta(layer), expected)
        assert (expected - DENSE[method](factors, layer)).abs().max() > 1e-5
        for rows in (slice(0, 5), slice(5, 17), slice(17, 24)):
            assert_close(factors.delta(layer, rows), expected[rows])


@all_methods
def test_rounding_masters_changes_no_bit_of_the_function(method):
    stack = stack_of(3, 24, 20)
    factors = moved(fitted(method, stack, rank_of(method)))
    layer = AdaptedLinear(20, 24, bias=False, fmt=None, dtype=torch.float32)
    layer.store(DenseWeight(stack[0]), None)
    layer.attach(FactorBank({"stack": factors}), "stack", 1)
    x = stack_of(6, 20, seed=2)
    y = layer(x)
    with torch.no_grad():
        recorded = layer.eval()(x)
        factors.eval()
        assert_close(layer(x), recorded)
    factors.round_masters()
    assert torch.equal(layer(x), y)
    assert all(t.dtype in (torch.bfloat16, torch.uint8) for t in stored_factors(factors).values())


@all_methods
def test_a_layer_under_autocast_trains_in_half_precision(method, monkeypatch):
    factors = moved(fitted(method, stack_of(3, 24, 20), rank_of(method)))
    layer = AdaptedLinear(20, 24, bias=False, fmt=None, dtype=torch.float32)
    layer.store(DenseWeight(stack_of(3, 24, 20)[0]), None)
    layer.attach(FactorBank({"stack": factors}), "stack", 1)
    x = stack_of(6, 20, seed=2).requires_grad_()
    expected = layer(x)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *factors.trained()])
    name = "core" if hasattr(factors, "core") else "matrices"
    made = []
    compute = getattr(factors, name)
    monkeypatch.setattr(factors, name, lambda layer: made.append(compute(layer)) or made[-1])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert made
    cores = [one for found in made for one in (found if isinstance(found, tuple) else (found,))]
    assert all(core is None or core.dtype == torch.float32 for core in cores)
    found = torch.autograd.grad(y.float().square().sum(), [x, *factors.trained()])
    assert (y - expected).norm() <= 0.02 * expected.norm()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


# The start


@pytest.mark.parametrize(("architecture", "method"), covered(METHODS))
def test_the_function_is_kept_at_the_start(architecture, method):
    """Without quantization, on every architecture. Measured: at most 4e-6 of the largest logit."""
    original = logits(ARCHITECTURES[architecture]())
    found = logits(prepared(architecture, method, bits=16))
    assert (found - original).abs().max() <= 1e-5 * original.abs().max()


@zero_methods
def test_a_zero_update_quantizes_whole_weights_and_refines_nothing(method):
    model = prepared("bert", method)
    plain = prepared("bert", "refta", rank=0)
    for row, whole in zip(qrefta.quant_report(model), qrefta.quant_report(plain), strict=True):
        assert row["residual_error"] == whole["residual_error"]
        assert row["principal_energy"] == 0
        assert row["transform"] is None
    for factors in getattr(model, BANK).values():
        assert not factors.delta(1).any()


@zero_methods
def test_random_numbers_are_the_seeds_alone(method):
    stack = stack_of(3, 24, 20)
    other = stack_of(3, 24, 20, seed=5)
    first, second = (stored_factors(fitted(method, one, 4)) for one in (stack, other))
    third = stored_factors(fitted(method, stack, 4, seed=1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_random_factors_have_the_lengths_that_their_files_state():
    """LoTR's columns and rows are orthonormal, LoRTA's rows unit vectors."""
    stack = stack_of(3, 24, 20, dtype=torch.float64)
    lotr, lorta = (fitted(method, stack, 4, torch.float64) for method in ("lotr", "lorta"))
    identity = torch.eye(4, dtype=torch.float64)
    assert_close(lotr.L.T @ lotr.L, identity)
    assert_close(lotr.R @ lotr.R.T, identity)
    assert_close(lorta.B.norm(dim=1), identity.diagonal())


@pytest.mark.parametrize(
    ("layers", "rank", "width", "firsts"),
    [
        (6, 18, 8, [0, 2, 4, 6, 8, 10]),
        (6, 5, 5, [0] * 6),
        (3, 24, 8, [0, 8, 16]),
        (3, 27, 9, [0, 9, 18]),
        (4, 10, 8, [0, 0, 1, 2]),
        (1, 12, 12, [0]),
    ],
)
def test_windows_move_from_the_first_component_to_the_last(layers, rank, width, firsts):
    windows = Windows(layers, 7, 9, rank, torch.bfloat16)
    slices = [slice(first, first + width) for first in firsts]
    assert [windows.window(layer) for layer in range(layers)] == slices
    with torch.no_grad():
        for parameter in windows.trained():
            parameter.copy_(torch.randn(parameter.shape).bfloat16())
    for layer, part in enumerate(slices):
        assert_close(windows.delta(layer), windows.A[:, part] @ windows.B[part])
        assert_close(windows.delta(layer, slice(2, 5)), windows.A[2:5, part] @ windows.B[part])


def test_a_layer_trains_its_window():
    """The product in training and in evaluation, and the gradient, are the ones of the window."""
    dense = models.tiny_llama()
    model = qrefta.prepare(dense, method="windows", rank=10, bits=16, factor_dtype="float32")
    with torch.no_grad():
        for factors in getattr(model, BANK).values():
            factors.A += 0.1 * torch.randn(factors.A.shape)
    merged = qrefta.merge(copy.deepcopy(model), dtype=torch.float32)
    assert_close(logits(model.train()), logits(merged), atol=1e-4, rtol=1e-4)
    assert_close(logits(model.eval()), logits(merged), atol=1e-4, rtol=1e-4)
    for factors in getattr(model, BANK).values():
        layer = factors.layers - 1
        x = torch.randn(3, factors.in_features)
        weight = DenseWeight(torch.zeros(factors.out_features, factors.in_features))
        factors.product(x, layer, None, weight).square().sum().backward()
        rows = factors.B.grad.abs().sum(1) > 0
        assert rows.nonzero().flatten().tolist() == list(range(10))[factors.window(layer)]


def test_tera_starts_with_matrices_that_keep_lengths():
    """||D_2||_F^2 is its rows, in the mean over seeds; one seed's share has a deviation of 0.43."""
    matrices = (
        fitted("tera", stack_of(1, 24, 20), 16, torch.float64, seed).matrices(0)[1]
        for seed in range(200)
    )
    shares = [matrix.square().sum().item() / len(matrix) for matrix in matrices]
    assert np.mean(shares) == pytest.approx(1, abs=4 * 0.43 / len(shares) ** 0.5)


@zero_methods
def test_the_first_step_has_a_gradient(method):
    factors = fitted(method, stack_of(3, 24, 20), 4)
    DENSE[method](factors, 1).sum().backward()
    assert any(
        parameter.grad is not None and parameter.grad.any() for parameter in factors.trained()
    )


def test_craft_quantizes_less_than_whole_weights():
    """And refinement leaves less again."""
    one_shot, refined = (
        [
            row["ratio"]
            for row in qrefta.quant_report(
                prepared("bert", "craft", rank=(3, 12, 12), refine=rounds)
            )
        ]
        for rounds in (0, 5)
    )
    assert all(a < 0.95 for a in one_shot)
    assert all(b < a for a, b in zip(one_shot, refined, strict=True))


@pytest.mark.parametrize(
    ("method", "rank"), [("refta", 7), ("craft", (2, 5, 6)), ("craft", (4, 12, 20))]
)
def test_a_fit_reports_the_energy_that_it_takes_away(method, rank):
    """The squared norms of the projection and of the rest add up to ||W||^2 over all layers."""
    stack = decaying(4, 12, 20)
    U = transform_of(stack, "lsm3")
    found = METHODS[method].fit(slices_of(stack, U), rank, U, torch.float64, 0)
    left = sum(
        (weight - found.factors.delta(layer)).square().sum() for layer, weight in enumerate(stack)
    )
    assert_close(left.item(), stack.square().sum().item() - found.energy, rtol=1e-5, atol=1e-5)


def test_craft_splits_under_the_lsm3_basis_of_the_layers():
    """The principal energy equals the energy of an HOSVD whose layer mode is cut to one."""
    model = ARCHITECTURES["bert"]()
    stack = find_stacks(model)[0]
    weights = model_weights(model, stack).rows(0, stack.out_features).double()
    found, _ = tucker_of(weights, (1, 32, 32))
    (row, *_) = qrefta.quant_report(
        qrefta.prepare(model, method="craft", rank=(1, 32, 32), refine=0, progress=False)
    )
    expected = found.core.square().sum() / weights.square().sum()
    assert row["principal_energy"] == pytest.approx(expected.item(), rel=1e-3)


def test_craft_is_calibrated():
    """It leaves less error of the outputs on the calibration's inputs than the split by weights."""
    model = ARCHITECTURES["bert"]()
    generator = torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(9, (8, 12), generator=generator)} for _ in range(4)]
    moments = gather_moments(model, find_stacks(model), batches, progress=False)
    options = {"method": "craft", "rank": (3, 12, 12), "progress": False}
    found = qrefta.quant_report(qrefta.prepare(model, moments=moments, **options))
    plain = qrefta.quant_report(qrefta.prepare(ARCHITECTURES["bert"](), **options))
    assert sum(row["output_ratio"] for row in found) / len(found) < sum(
        row["ratio"] for row in plain
    ) / len(plain)
    assert all(row["output_ratio"] < row["ratio"] for row in found)


# Counts and ranks


def test_craft_trains_the_papers_count():
    """Two stacks of (24, 100, 100): 41,152, whatever depth and width are."""
    with torch.device("meta"):
        for layers, size in ((24, 1024), (48, 4096)):
            assert (
                2 * CRAFT(layers, size, size, (24, 100, 100), torch.bfloat16).trained_count
                == 41_152
            )


@pytest.mark.parametrize(
    ("shape", "asked", "given"),
    [
        ((24, 1024, 1024), (24, 100, 100), (24, 100, 100)),
        ((6, 384, 384), (24, 100, 500), (6, 100, 384)),
        ((1, 40, 60), (3, 50, 30), (1, 30, 30)),
        ((5, 40, 60), (5, 2, 2), (4, 2, 2)),
        ((3, 40, 60), (3, 20, 5), (3, 15, 5)),
        ((3, 40, 60), (3, 5, 20), (3, 5, 15)),
        ((6, 384, 384), 16, (6, 16, 16)),
    ],
)
def test_crafts_ranks_are_capped_by_the_stack(shape, asked, given):
    assert CRAFT.rank_of(*shape, asked) == given


@all_methods
def test_a_budget_of_trainable_parameters_is_kept_and_used(method):
    """The largest rank within the budget: one more would exceed it."""
    budget = RankBudget(trainable_parameters=5000)
    model = qrefta.prepare(
        ARCHITECTURES["bert"](), rank=budget, method=method, refine=0, progress=False
    )
    bank = getattr(model, BANK)
    count = sum(factors.trained_count for factors in bank.values())
    assert count <= 5000
    more = 0
    for factors in bank.values():
        shape = (factors.layers, factors.out_features, factors.in_features)
        rank = factors.rank if isinstance(factors.rank, int) else max(factors.rank)
        rank = min(rank + 1, type(factors).largest_rank(*shape))
        more += type(factors)(*shape, rank, torch.bfloat16).trained_count
    assert more > 5000 or more == count


def test_a_budget_of_trainable_parameters_gives_crafts_ranks():
    model = prepared("bert", "craft", rank=RankBudget(trainable_parameters=2000))
    (ranks,) = {tuple(row["rank"]) for row in qrefta.quant_report(model)}
    assert ranks == (3, 12, 12)  # six stacks of 9 + 144 + 144


def test_bad_settings_are_refused():
    for settings, message in [
        ({"method": "refta", "rank": (2, 3, 4)}, "ReFTA has one rank; give one whole number"),
        ({"method": "tera", "rank": (2, 3, 4)}, "TeRA has one rank; give one whole number"),
        ({"method": "craft", "rank": (2, 3)}, "CRAFT takes one whole number, or three"),
        ({"method": "craft", "rank": (2, 3, 0)}, "each number of rank is 0"),
        (
            {"method": "craft", "transform": "dct"},
            r"transform \(with method craft\) is 'dct'; it must be one of lsm3",
        ),
        (
            {"method": "craft", "rank": RankBudget(error_ratio=0.5)},
            "error_ratio needs method refta, and method is 'craft'",
        ),
        ({"method": "lotr", "rank": 33}, "method lotr the largest allowed rank is 32"),
        (
            {"rank": RankBudget(trainable_parameters=10)},
            r"budget is 10 trainable parameters, but rank 1 of the 6 stacks has \d+; give",
        ),
        ({"method": "loha"}, "method is 'loha'; it must be one of refta, craft, tera, lotr, lorta"),
    ]:
        model = ARCHITECTURES["bert"]()
        before = logits(model)
        with pytest.raises(ValueError, match=message):
            qrefta.prepare(model, progress=False, **settings)
        assert torch.equal(logits(model), before)


# Save, load, merge, convert


KINDS = ["bert_100", "llama_gqa", "gpt2", "vit"]


@pytest.mark.parametrize(
    ("method", "architecture"),
    [*zip(METHODS, cycle(KINDS), strict=False), *product(["windows"], KINDS[:1] + KINDS[2:])],
)
def test_round_trip_and_merge(method, architecture, tmp_path):
    """Random frozen tensors are in the file; the merged model computes the same in float32."""
    model = prepared(architecture, method, steps=True)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(123)
    loaded = qrefta.load(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert qrefta.quant_report(loaded) == qrefta.quant_report(model)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    merged = qrefta.merge(loaded, torch.float32)
    assert (logits(merged) - expected).abs().max() <= 1e-4 * expected.abs().max()
    untrained = qrefta.merge(prepared(architecture, method), torch.float32)
    assert (logits(untrained) - expected).abs().max() > 1e-3


@all_methods
def test_a_checkpoint_is_prepared_as_a_model_in_memory(method, tmp_path):
    ARCHITECTURES["bert"]().save_pretrained(tmp_path / "dense")
    options = {"method": method, "progress": False, "refine": 2} | RANKS[method]
    qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "out", **options)
    ours = qrefta.load(tmp_path / "out")
    theirs = prepared("bert", method, refine=2)
    assert qrefta.quant_report(ours) == qrefta.quant_report(theirs)
    assert torch.equal(logits(ours), logits(theirs))


@all_methods
def test_an_optimizer_moves_the_factors_alone_and_lowers_the_loss(method):
    model = prepared("bert", method)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = inputs(model) | {"labels": torch.arange(len(next(iter(inputs(model).values())))) % 3}
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    names = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert any(name.startswith(BANK) for name in names)
    assert all(name.startswith((BANK, "classifier")) for name in names)


@all_methods
def test_gradients_are_the_same_checkpointed(method):
    model = prepared("llama_gqa", method, steps=True)
    batch = inputs(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, trained)
    enable_checkpointing(model.train())
    found = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, trained)
    assert_close(found, expected, rtol=0, atol=0)


@all_methods
def test_a_compiled_layer_has_no_graph_break_and_the_same_gradients(method):
    torch.compiler.reset()
    factors = moved(fitted(method, stack_of(3, 24, 20), rank_of(method)))
    layer = AdaptedLinear(20, 24, bias=False, fmt=None, dtype=torch.float32)
    layer.store(DenseWeight(stack_of(3, 24, 20)[0]), None)
    layer.attach(FactorBank({"stack": factors}), "stack", 1)
    leaves = [stack_of(6, 20, seed=2).requires_grad_(), *factors.trained()]
    expected = torch.autograd.grad(layer(leaves[0]).square().sum(), leaves)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(leaves[0]).square().sum(), leaves)
    assert_close(found, expected)
    torch.compiler.reset()


# HOSVD, against tensorly


def higher_order_svd(tensor, ranks):
    """The classical one, by tensorly's unfoldings and mode products."""
    factors = [
        np.linalg.svd(tensorly.unfold(tensor, mode), full_matrices=False)[0][:, :rank]
        for mode, rank in enumerate(ranks)
    ]
    core = multi_mode_dot(tensor, [factor.T for factor in factors])
    return core, factors, multi_mode_dot(core, factors)


def decaying(*shape):
    """A stack whose modes have strong and weak directions."""
    tensor = stack_of(*shape, dtype=torch.float64).numpy()
    for mode, size in enumerate(shape):
        basis = np.linalg.qr(stack_of(size, size, seed=mode + 1, dtype=torch.float64).numpy())[0]
        tensor = multi_mode_dot(tensor, [basis * 0.8 ** np.arange(size)], modes=[mode])
    return torch.from_numpy(tensor)


def tucker_of(stack, ranks, start=None, blocks=1):
    U = transform_of(stack, "lsm3")
    whole = slices_of(stack, U, rows=-(-stack.shape[1] // blocks))
    return hosvd(whole, ranks, 0, start), U


def approximation(found, U, kept):
    slices = found.left @ found.core @ found.right
    return torch.einsum("lk,koi->loi", U[:, :kept], slices)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(
    "ranks", [(6, 20, 30), (6, 5, 7), (3, 8, 5), (1, 4, 4), (6, 20, 7), (3, 15, 5), (2, 9, 5)]
)
def test_hosvd_is_tensorlys(ranks, blocks):
    """The input basis is tensorly's if no layer is cut; the error is at most 2 % larger."""
    stack = decaying(6, 20, 30)
    found, U = tucker_of(stack, ranks, blocks=blocks)
    core, factors, theirs = higher_order_svd(stack.numpy(), ranks)
    ours = approximation(found, U, ranks[0])
    if ranks[0] == 6:
        assert_close(found.right.T @ found.right, torch.from_numpy(factors[2] @ factors[2].T))
    assert (ours - stack).norm() <= 1.02 * np.linalg.norm(theirs - stack.numpy()) + 1e-9
    assert_close(found.core.square().sum(), ours.square().sum())
    assert_close(
        torch.einsum("kor,koi->ri", found.core, found.core).diagonal().sum(),
        found.core.square().sum(),
    )
    if ranks == (6, 20, 30):
        assert_close(ours, stack)
        assert_close(found.core.square().sum().sqrt().item(), np.linalg.norm(core))


def test_the_iterated_basis_captures_as_much_as_the_exact_basis():
    """Measured: 0.05 % of the energy less; and a start on the last basis loses nothing."""
    stack = decaying(4, 60, 200)
    found, _ = tucker_of(stack, (4, 10, 10))
    assert 6 * 10 < 200  # the iterated one
    _, _, theirs = higher_order_svd(stack.numpy(), (4, 10, 10))
    energy = found.core.square().sum().item()
    assert energy >= 0.998 * np.linalg.norm(theirs) ** 2
    again, _ = tucker_of(stack, (4, 10, 10), start=found.basis)
    assert again.core.square().sum().item() >= 0.9999 * energy


SPREAD = torch.logspace(0, -2, 30, dtype=torch.float64)  # second moments of 30 inputs
WEIGHTED = Metric(SPREAD.sqrt(), 1 / SPREAD.sqrt())


def test_a_metric_moves_the_decomposition_to_the_outputs():
    """Less error of x W^T for inputs with second moment S than without it, more weight error."""
    stack = stack_of(4, 20, 30, dtype=torch.float64)
    U = transform_of(stack, "lsm3")
    plain, weighted = (
        hosvd(slices_of(stack, U, metric=metric), (4, 8, 8), 0) for metric in (None, WEIGHTED)
    )
    errors = [stack - approximation(found, U, 4) for found in (plain, weighted)]
    left = (stack * SPREAD.sqrt()).square().sum() - weighted.core.square().sum()
    assert_close((errors[1] * SPREAD.sqrt()).square().sum(), left)
    assert errors[1].norm() > errors[0].norm()
    assert (errors[1] * SPREAD.sqrt()).norm() < (errors[0] * SPREAD.sqrt()).norm()


def test_under_a_metric_it_is_the_decomposition_of_the_weighted_stack():
    """The decomposition of W S^(1/2), and back through S^(-1/2)."""
    stack = decaying(4, 20, 30)
    U = transform_of(stack, "lsm3")
    found = hosvd(slices_of(stack, U, metric=WEIGHTED), (4, 8, 8), 0)
    weighted = hosvd(slices_of(stack * SPREAD.sqrt(), U), (4, 8, 8), 0)
    assert_close(approximation(found, U, 4) * SPREAD.sqrt(), approximation(weighted, U, 4))


# TeRA


@pytest.mark.parametrize(
    ("features", "sizes"),
    [
        (1, (1, 1)),
        (2, (1, 2)),
        (16, (4, 4)),
        (384, (16, 24)),
        (1536, (32, 48)),
        (101, (11, 10)),
        (26, (6, 5)),
    ],
)
def test_mode_sizes_are_even_and_cover_the_features(features, sizes):
    assert mode_sizes(features) == sizes


def test_mode_sizes_waste_little():
    for features in range(1, 3000):
        first, second = mode_sizes(features)
        assert features <= first * second <= features + first
        assert max(first, second) <= 4 * min(first, second)


@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 101, 97)])
def test_teras_rank_is_far_above_loras_with_as_many_numbers(shape):
    """LoRA of rank 1 trains in + out parameters a layer, TeRA of rank 8 trains 32."""
    factors = moved(fitted("tera", stack_of(*shape), 8, torch.float64))
    assert factors.trained_count == 2 * 4 * 8
    update = torch.kron(*factors.matrices(0))[: shape[1], : shape[2]]
    assert_close(factors.delta(0), update.float())
    assert torch.linalg.matrix_rank(update) == 64


def test_tera_never_forms_a_dense_update():
    """Tensors made in a forward and backward pass are of the tokens' size or the small modes'."""
    layers = 2
    out = 400
    width = 600
    tokens = 3
    factors = moved(fitted("tera", stack_of(layers, out, width), 8))
    x = stack_of(tokens, width).requires_grad_()
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            found = function(*arguments, **keywords or {})
            made.extend(
                t.numel()
                for t in (found if isinstance(found, tuple) else (found,))
                if torch.is_tensor(t)
            )
            return found

    with Watch():
        first, second = factors.matrices(0)
        kronecker_product(x, first, second, out).square().sum().backward()
    assert max(made) <= 2 * tokens * width < out * width / 10


# A method from outside


def test_the_guides_method_works_from_outside(tmp_path):
    """Its code as it stands, through prepare, training, saving, loading and merging."""
    guide = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    try:
        exec(code, {})
        original = ARCHITECTURES["bert"]()
        model = qrefta.prepare(
            ARCHITECTURES["bert"](), method="mean-scale", rank=4, bits=16, progress=False
        )
        assert (logits(model) - logits(original)).abs().max() <= 1e-5
        factors = getattr(model, BANK)["stack0"]
        assert factors.trained_count == factors.layers * 4
        moved(factors)
        assert (logits(model) - logits(original)).abs().max() > 1e-4
        expected = logits(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(qrefta.load(tmp_path)), expected)
        assert_close(logits(qrefta.merge(model, torch.float32)), expected, rtol=1e-4, atol=1e-4)
    finally:
        METHODS.pop("mean-scale", None)
    with pytest.raises(ValueError, match="method is 'mean-scale'; it must be one of refta"):
        qrefta.load(tmp_path)
