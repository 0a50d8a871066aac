"""A stack of weights -> trained factors + quantized residuals: W_l ~ dequant(Q_l) + Delta_l."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qrefta.config import QReftaConfig
from qrefta.factors import Factors
from qrefta.methods import METHODS
from qrefta.quantize import Packed, dequantize, quantize, squared_error
from qrefta.tensor import transform_matrix


class Split(NamedTuple):
    """One stack, split.

    Attributes:
        factors: None where the stack is quantized only.
        residuals: K packed matrices, or with 16 bits dense ones in float32.
        error: sum_l ||W_l - Delta_l - dequant(Q_l)||_F^2.
    """

    factors: Factors | None
    residuals: list[Packed] | list[Tensor]
    error: float


def quantize_stack(weights: Tensor, config: QReftaConfig) -> Split:
    """The whole weights of a stack (layers, out, in) quantized, without factors."""
    if config.format is None:
        return Split(None, [weight.clone() for weight in weights], 0.0)  # not views of one storage: they are saved
    return _requantize(weights, None, config)


def baseline_error(weights: Tensor, config: QReftaConfig) -> float:
    """sum_l ||W_l - Q(W_l)||_F^2, a layer at a time; 0 with 16 bits."""
    return 0.0 if config.format is None else sum(_requantize(weight[None], None, config).error for weight in weights)


def split_stack(weights: Tensor, config: QReftaConfig) -> Split:
    """Factors and residuals of a stack.

    Without `refine` rounds: factors of W, then the residuals quantized. Each round refits the factors to
    W - dequant(Q) and requantizes W - Delta, under the transform of W throughout: with it fixed, a refit cannot raise
    the error (up to the factors' rounding). A last refit follows; the best of all pairs seen is returned.

    Args:
        weights: (layers, out, in), float32, finite.
        config: method, transform, rank, format and rounds.

    Peak memory beside `weights`: half a stack in float32 without rounds, one and a half with them or 16 bits.
    """
    transform = transform_matrix(weights, config.transform)
    factors = _fit(weights, transform, config)
    if config.format is None:
        return Split(factors, [weight - factors.delta(layer) for layer, weight in enumerate(weights)], 0.0)
    current = best = _requantize(weights, factors, config)
    for _ in range(config.refine):
        refitted = _refit(weights, current.residuals, transform, config)
        current = _requantize(weights, refitted.factors, config)
        best = min(best, refitted, current, key=_error)
    if config.refine:
        best = min(best, _refit(weights, current.residuals, transform, config), key=_error)
    return best


def _fit(target: Tensor, transform: Tensor, config: QReftaConfig) -> Factors:
    return METHODS[config.method].fit(target, config.rank, transform, config.torch_factor_dtype)


def _refit(weights: Tensor, residuals: list[Packed], transform: Tensor, config: QReftaConfig) -> Split:
    """The factors of W - dequant(Q), with Q kept."""
    target = torch.empty_like(weights)
    for layer, dense in enumerate(_dense(residuals, weights, config)):
        torch.sub(weights[layer], dense, out=target[layer])
    factors = _fit(target, transform, config)
    return Split(factors, residuals, sum(squared_error(t, factors.delta(layer)) for layer, t in enumerate(target)))


def _requantize(weights: Tensor, factors: Factors | None, config: QReftaConfig) -> Split:
    """The residuals of W - Delta, with Delta kept (0 without factors)."""
    residuals, error = [], 0.0
    for layer, weight in enumerate(weights):
        rest = weight if factors is None else weight - factors.delta(layer)
        residuals.append(quantize(rest, config.format))
        error += squared_error(rest, dequantize(residuals[-1], config.format, tuple(rest.shape), rest.dtype))
    return Split(factors, residuals, error)


def _dense(residuals: list[Packed], weights: Tensor, config: QReftaConfig) -> Iterator[Tensor]:
    return (dequantize(packed, config.format, tuple(weights.shape[1:]), weights.dtype) for packed in residuals)


def _error(split: Split) -> float:
    return split.error
