"""GPTQ (Frantar et al., arXiv 2210.17323) onto the grid of a format: scales by absolute maximum,
no search, no factors.

This is the published algorithm with the inverse of the moment, in the order of the columns or, as
the option desc_act with static groups of its implementations has it, of the inputs' energy. The
moments are the 16-bit model's; GPTQ itself gathers them on the layers that are quantized already.
qrefta's rounding with error feedback is written differently (`qrefta.linalg.feedback`), so that
each checks the other.
"""

import torch
from torch import Tensor

from qrefta.choices import QuantType
from qrefta.nn.grid import Grid, absmax_scales, grid_of, inverse, nearest

DAMPING = 0.01  # share of the mean of the moment's diagonal that is added to it, as GPTQ does


def gptq(
    weight: Tensor,
    moment: Tensor,
    block: int = 64,
    damping: float = DAMPING,
    quant_type: QuantType = "nf4",
    ordered: bool = False,
) -> Tensor:
    """A matrix rounded to a format, column by column; the columns after it make up for each error.

    With the Cholesky factor U of the inverse moment, inv(S) = U^T U, a column's error e gives
    W_j -= e U_kj / U_kk for all later columns j. The scale of a block is the largest magnitude of
    its weights at the time when its first column is rounded, or with `ordered` at the start.

    Args:
        weight: (out, in), float32.
        moment: S = E[x^T x] of the inputs, (in, in).
        block: weights that share a scale, in a row.
        damping: see DAMPING.
        quant_type: whose levels are taken; scales are not rounded.
        ordered: columns with larger inputs come first.

    Raises:
        ValueError: if rows are not whole blocks.
    """
    width = weight.shape[1]
    if width % block:
        raise ValueError(f"rows have {width} weights; they must be whole blocks of {block}")
    grid = grid_of(quant_type, weight.device)
    order = torch.arange(width, device=weight.device)
    scales = None
    if ordered:
        order = moment.diagonal().argsort(descending=True, stable=True)
        of_blocks = absmax_scales(weight.reshape(-1, block), grid).view(len(weight), -1)
        scales = of_blocks.repeat_interleave(block, dim=1)[:, order]
    factor = _inverse_factor(moment[order][:, order], damping)
    rest = weight[:, order]
    result = torch.empty_like(weight)
    for start in range(0, width, block):
        part = slice(start, start + block)
        given = None if scales is None else scales[:, part]
        rounded, errors = _round_block(rest[:, part], factor[part, part], grid, given)
        result[:, order[part]] = rounded
        rest[:, start + block :] -= errors @ factor[part, start + block :]
    return result


def _inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with inv(S + damping mean(diag) I) = U^T U; float32."""
    damped = moment.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    inverse_moment = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse_moment, upper=True).float()


def _round_block(
    rest: Tensor, factor: Tensor, grid: Grid, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Some columns rounded, and the error of every column over its diagonal entry of U.

    Args:
        rest: (out, columns).
        factor: U for them.
        grid: of the levels.
        scales: (out, columns); None: one for each row, of the columns as they are.
    """
    columns = rest.T.contiguous()
    if scales is None:
        scales = absmax_scales(rest, grid).unsqueeze(1).expand_as(rest)
    inverse_scales = inverse(scales)
    rounded = torch.empty_like(columns)
    errors = torch.empty_like(columns)
    for k, column in enumerate(columns):
        rounded[k] = grid.levels[nearest(column, inverse_scales[:, k], grid)] * scales[:, k]
        errors[k] = (column - rounded[k]) / factor[k, k]
        columns[k + 1 :].addr_(factor[k, k + 1 :], errors[k], alpha=-1)
    return rounded.T, errors.T
