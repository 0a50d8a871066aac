"""How far a language model's next-token distributions are from a reference model's.

The measure is the KL divergence KL(reference || model) in nats, token by token. It is 0 where both
models predict the same distribution. A text is read window by window, and a few numbers a token are
kept: the logits of a whole text would not fit in memory.

The tokens of a window share their context and are not independent. Standard errors therefore take
the window as the unit of sampling (cluster-robust variance of a ratio; Cochran, Sampling
Techniques, 1977, section 6.3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_ROWS = 64  # 64 x 128,000 float32 numbers are 33 MB


class TokenStatistics(NamedTuple):
    """Two models' predictions of the tokens of a window; one entry a token, on the CPU.

    Attributes:
        loss: -log of the probability that the model gives the true token, in nats.
        reference_loss: the same for the reference.
        divergence: KL(reference || model) of the next-token distributions, in nats.
        agreement: whether the most probable tokens of both are the same.
        flip: whether exactly one of the two has the true token as its most probable one.
    """

    loss: Tensor
    reference_loss: Tensor
    divergence: Tensor
    agreement: Tensor
    flip: Tensor


class Estimate(NamedTuple):
    """A mean over tokens.

    Attributes:
        mean: over all tokens of all windows.
        stderr: standard error of the mean; None for a single window, which does not tell it.
    """

    mean: float
    stderr: float | None


@torch.no_grad()
def token_losses(logits: Tensor, targets: Tensor, rows: int = _ROWS) -> Tensor:
    """-log of the probability of each target, float32, (tokens,), on the CPU.

    The softmax is computed in float32, whatever the dtype of the logits. Beyond the logits, one
    float32 copy of `rows` rows is in memory.

    Args:
        logits: (tokens, vocabulary), any float dtype and device.
        targets: (tokens,), the true next tokens.
        rows: computed at a time.
    """
    losses = torch.empty(len(targets), dtype=torch.float32)
    for part in _parts(len(targets), rows):
        losses[part] = _losses(logits[part].float().log_softmax(dim=-1), targets[part])
    return losses


@torch.no_grad()
def compare_logits(
    logits: Tensor, reference_logits: Tensor, targets: Tensor, rows: int = _ROWS
) -> TokenStatistics:
    """The statistics of each token of a window.

    The softmax is computed in float32, whatever the dtypes. Of two tokens with equal logits the
    first counts as the more probable one. Rounding can leave a sum slightly below zero; it is
    raised to zero. Beyond the logits, at most four float32 copies of `rows` rows are in memory.

    Args:
        logits: of the model, (tokens, vocabulary), any float dtype and device.
        reference_logits: of the reference, the same shape, any float dtype and device.
        targets: (tokens,), the true next tokens.
        rows: computed at a time.

    Raises:
        ValueError: if the two shapes differ.
    """
    if logits.shape != reference_logits.shape:
        raise ValueError(
            f"The logits are {tuple(logits.shape)} and the reference's "
            f"{tuple(reference_logits.shape)}; both must be (tokens, vocabulary) of the same sizes."
        )
    tokens = len(targets)
    # Results that are made between large temporary tensors would fragment the heap: up to 0.6 GB
    # for 512 rows of 128,000 numbers. So their places are made first.
    measured = TokenStatistics(
        loss=torch.empty(tokens, dtype=torch.float32),
        reference_loss=torch.empty(tokens, dtype=torch.float32),
        divergence=torch.empty(tokens, dtype=torch.float32),
        agreement=torch.empty(tokens, dtype=torch.bool),
        flip=torch.empty(tokens, dtype=torch.bool),
    )
    for part in _parts(tokens, rows):
        compared = _compare(logits[part], reference_logits[part], targets[part])
        for whole, values in zip(measured, compared, strict=True):
            whole[part] = values
    return measured


def _parts(tokens: int, rows: int) -> list[slice]:
    """Slices of at most `rows` rows that cover all tokens."""
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _compare(logits: Tensor, reference_logits: Tensor, targets: Tensor) -> TokenStatistics:
    """The statistics of some rows, on the device of `logits`."""
    targets = targets.to(logits.device)
    found = logits.float().log_softmax(dim=-1)
    expected = reference_logits.to(logits.device).float().log_softmax(dim=-1)
    divergence = (expected - found).mul_(expected.exp()).sum(dim=-1)
    first = logits.argmax(dim=-1)
    reference_first = reference_logits.argmax(dim=-1).to(logits.device)
    return TokenStatistics(
        loss=_losses(found, targets),
        reference_loss=_losses(expected, targets),
        divergence=divergence.clamp(min=0),
        agreement=first == reference_first,
        flip=(first == targets) != (reference_first == targets),
    )


def _losses(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    targets = targets.to(log_probabilities.device)
    return -log_probabilities.gather(-1, targets[:, None])[:, 0]


def mean_over_tokens(windows: Sequence[Tensor]) -> Estimate:
    """The mean over all tokens, with a standard error that takes windows as the unit of sampling.

    With S_w the sum and n_w the number of tokens of window w, the mean is m = sum S_w / sum n_w and
    its variance W / (W - 1) * sum (S_w - n_w m)^2 / (sum n_w)^2, for W windows.

    Args:
        windows: one tensor a window, (tokens,), of any lengths.
    """
    sums = np.array([window.double().sum().item() for window in windows])
    counts = np.array([len(window) for window in windows])
    mean = sums.sum() / counts.sum()
    if len(windows) == 1:
        return Estimate(float(mean), None)
    deviations = sums - counts * mean
    variance = len(windows) / (len(windows) - 1) * np.square(deviations).sum()
    return Estimate(float(mean), float(np.sqrt(variance) / counts.sum()))


def perplexity(losses: Sequence[Tensor]) -> Estimate:
    """Exp of the mean loss; its standard error is the loss's times the perplexity (delta method).

    Args:
        losses: one tensor a window, (tokens,), in nats.
    """
    loss = mean_over_tokens(losses)
    with np.errstate(over="ignore"):  # infinite above a loss of 709
        value = float(np.exp(loss.mean))
    return Estimate(value, None if loss.stderr is None else value * loss.stderr)
