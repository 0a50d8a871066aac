"""The update of every target of a prepared model, as two thin factors.

On its residual a layer's update is Delta_l, of rank r: (up core_l, down). On the original weight
W_l it is the change by training, Delta_l minus Delta_l at the start, of rank 2r: for ReFTA
[A' diag(u_l), -A diag(u_l)] and [B'; B].

The factors at the start come from the prepared model before training. Without it the original is
split again, and equal packed weights prove that the split is the same.
"""

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qrefta.config.report import StackReport
from qrefta.hf_config import QReftaConfig
from qrefta.linalg.slices import Slices
from qrefta.linalg.tsvd import squared_norm, t_svd
from qrefta.model.prepared import is_prepared, prepared_config
from qrefta.model.weights import model_weights
from qrefta.nn.factors import Factors, LowRankFactors
from qrefta.nn.linear import AdaptedLinear, adapted_layer
from qrefta.nn.quantized import FrozenWeight
from qrefta.split.residual import split_layers, split_stack

# A squared error may differ by this much from the one that preparing measured. On tiny models the
# two were equal in the same dtype; with weights that were prepared in float32 and loaded in bf16
# they differed by up to 2e-3 of the error and 2e-5 of the weights' squared norm. Weights that
# another fine-tuning moved by 1 % of their norm are beyond it.
_ERROR_SHARE = 5e-3
_NORM_SHARE = 1e-5


class Update(NamedTuple):
    """The update of one linear layer.

    Attributes:
        left, right: (out, r) and (r, in), float32; their product is the update.
        missing: squared norm of the part of the update that the product leaves out.
        norm: squared norm of the update; 0 if nothing is left out.
    """

    left: Tensor
    right: Tensor
    missing: float = 0.0
    norm: float = 0.0


@torch.no_grad()
def layer_updates(
    model: PreTrainedModel,
    config: QReftaConfig,
    starts: Iterator[Factors] | None,
    rank: int | None,
) -> Iterator[tuple[str, Update]]:
    """The path of every target and its update.

    A method whose Delta_l is not a product of two thin factors (TeRA) is cut to a rank.

    Args:
        model: prepared.
        config: of the model.
        starts: factors at the start of training, one a stack with factors; updates are then minus
            their Delta_l.
        rank: that updates are cut to; None keeps them whole.
    """
    rows = [row for row in config.stacks if row.rank]
    for row, start in zip(rows, repeat(None) if starts is None else starts, strict=False):
        for index, path in enumerate(row.stack.modules):
            factors = adapted_layer(model, path).factors
            assert factors is not None, "a stack with a rank has factors"
            yield path, _layer_update(factors, start, row.row(index), rank)


def _layer_update(factors: Factors, start: Factors | None, layer: int, rank: int | None) -> Update:
    if not isinstance(factors, LowRankFactors):
        width = rank or factors.rank
        assert isinstance(width, int), "a method with several ranks has low-rank factors"
        return _nearest(factors.delta(layer), width)
    left, right = factors.pair(layer)
    if start is not None:
        assert isinstance(start, LowRankFactors), "the factors are of the same method"
        first_left, first_right = start.pair(layer)
        left = torch.cat([left, -first_left.to(left)], dim=1)
        right = torch.cat([right, first_right.to(right)])
    elif rank is None:
        return Update(left, right)
    return _compressed(left, right, rank)


def starting_factors(
    model: PreTrainedModel,
    config: QReftaConfig,
    bare: PreTrainedModel,
    start: PreTrainedModel | None,
) -> Iterator[Factors]:
    """The factors that every target stack began with.

    Args:
        model: prepared and trained.
        config: of the model.
        bare: the original model, which is split again if there is no `start`.
        start: the prepared model before training.

    Raises:
        ValueError: if the packed weights that belong to them are not the model's.
    """
    if start is None and config.calibrated:
        raise ValueError(
            "The split was calibrated, so it cannot be made again from the original; give the "
            "prepared model before training, or its folder, as `start` (--start FOLDER)."
        )
    for row in config.stacks:
        if not row.rank:
            continue
        layers = [adapted_layer(model, path) for path in row.stack.modules]
        if start is None:
            weights = model_weights(bare, row.stack)
            settings = config.settings.of_stack(row.quant_type)
            split = split_stack(weights, settings, row.rank)
            residuals = (layer.residual for layer in split_layers(weights, split, settings))
            factors = split.factors
        else:
            begun = [adapted_layer(start, path) for path in row.stack.modules]
            residuals = [layer.frozen_weight() for layer in begun]
            factors = begun[0].factors
        _check_same(row, layers, residuals)
        if start is not None:
            _check_error(row, bare, layers, factors)
        assert factors is not None, "a stack with a rank has factors"
        yield factors


def check_start(start: PreTrainedModel, config: QReftaConfig) -> None:
    """Refuse a start that was not prepared as the model.

    Args:
        start: the prepared model before training.
        config: of the trained model.

    Raises:
        ValueError: if it is dense, or has other stacks or settings of the split.
    """
    if not is_prepared(start):
        raise ValueError(
            f"The start is a {type(start).__name__} that is not prepared; give the prepared model "
            "before training, or its folder, as `start`."
        )
    given = prepared_config(start)
    for name in ("method", "bits", "quant_type"):
        theirs = getattr(given.settings, name)
        ours = getattr(config.settings, name)
        if theirs != ours:
            raise ValueError(
                f"The start was prepared with {name} {theirs!r} and the model with {ours!r}; give "
                "the prepared model before training, or its folder, as `start`."
            )
    stacks = [(row.stack, row.rank, row.quant_type) for row in given.stacks]
    if stacks != [(row.stack, row.rank, row.quant_type) for row in config.stacks]:
        raise ValueError(
            "The start has other linear layers, ranks or bits than the model; give the prepared "
            "model before training, or its folder, as `start`."
        )


@torch.no_grad()
def check_original(model: PreTrainedModel, config: QReftaConfig, bare: PreTrainedModel) -> None:
    """Refuse an original that a model with a method which starts from zero was not prepared from.

    Raises:
        ValueError: naming the stack and both errors.
    """
    for row in config.stacks:
        layers = [adapted_layer(model, path) for path in row.stack.adapted]
        _check_error(row, bare, layers, None)


def _check_error(
    row: StackReport, bare: PreTrainedModel, layers: list[AdaptedLinear], factors: Factors | None
) -> None:
    """Refuse weights whose distance from the stored ones is not the error that preparing measured.

    It is the squared norm of W_l - dequant(Q_l) - Delta_l over all layers, for every method, with
    calibration and after refits. With 16 bits it is 0.

    Args:
        row: the stack as it was prepared.
        bare: the original model.
        layers: of the prepared model.
        factors: at the start; None if their Delta_l is zero.

    Raises:
        ValueError: naming the stack and both errors.
    """
    weights = model_weights(bare, row.stack)
    error = 0.0
    norm = 0.0
    for index, layer in enumerate(layers):
        weight = weights.layer(index)
        norm += squared_norm(weight)
        weight.sub_(layer.residual(torch.float32).to(weight.device))
        if factors is not None:
            weight.sub_(factors.delta(index).to(weight.device))
        error += squared_norm(weight)
    if abs(error - row.residual_error) > _ERROR_SHARE * row.residual_error + _NORM_SHARE * norm:
        raise ValueError(
            f"The stored weights of {row.stack.name} are {error:.4g} (squared norm) away from the "
            f"original's, and were {row.residual_error:.4g} away from those that were prepared: it "
            "was prepared from another model. Give that model as `original`."
        )


def _check_same(
    row: StackReport, layers: list[AdaptedLinear], residuals: Iterable[FrozenWeight]
) -> None:
    """Refuse factors of another split.

    Raises:
        ValueError: if the stored weights of a layer differ from its residual.
    """
    for path, layer, residual in zip(row.stack.modules, layers, residuals, strict=True):
        expected = residual.to(layer.weight.device, layer.weight.dtype).tensors()
        for name, tensor in layer.frozen_weight().tensors().items():
            if not torch.equal(tensor, expected[name]):
                raise ValueError(
                    f"The packed weights of {path} differ from the start's. The model was prepared "
                    "from another model, on another machine, or from another dtype, so splitting "
                    "again rounds differently. Give the prepared model before training, or its "
                    "folder, as `start`."
                )


def _compressed(left: Tensor, right: Tensor, rank: int | None) -> Update:
    """The product of two thin factors by its singular vectors, cut to a rank.

    It is computed in float64, and the product is never made. Even without a cut this is better: its
    factors round to bf16 with less error than a difference of two products.
    """
    left_basis, left_triangle = torch.linalg.qr(left.double())
    right_basis, right_triangle = torch.linalg.qr(right.T.double())
    svd = torch.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    kept = len(svd.S) if rank is None else min(rank, len(svd.S))
    roots = svd.S[:kept].sqrt()
    up = left_basis @ (svd.U[:, :kept] * roots)
    down = (roots.unsqueeze(1) * svd.Vh[:kept]) @ right_basis.T
    squares = svd.S.square()
    missing = squares[kept:].sum().item()
    return Update(up.float(), down.float(), missing, squares.sum().item())


def _nearest(matrix: Tensor, rank: int) -> Update:
    """The nearest matrix of a rank, with the roots of its singular values in both factors."""
    rank = min(rank, *matrix.shape)
    out_features, in_features = matrix.shape
    block = (slice(0, out_features), matrix.unsqueeze(0))
    slices = Slices(lambda: [block], (1, out_features, in_features), matrix.device)
    components, _ = t_svd(slices, rank, seed=0)
    roots = components.values.sqrt()
    left = (components.left * roots).float()
    right = (roots.unsqueeze(1) * components.right).float()
    missing = (matrix - left @ right).double().square().sum().item()
    return Update(left, right, missing, matrix.double().square().sum().item())
