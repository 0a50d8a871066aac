"""Statistics of tokens against plain loops in float64, and estimates against numpy."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qrefta.measure.divergence import (
    compare_logits,
    mean_over_tokens,
    perplexity,
    token_losses,
)
from tests.peak import added_peak

TOKENS = 50
VOCABULARY = 31


def near(value):
    """Rounding of float32; measured: 1e-7."""
    return pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.fixture
def logits():
    """Logits of a model, and of a reference that is near it."""
    generator = torch.Generator().manual_seed(0)
    reference = 3 * torch.randn(TOKENS, VOCABULARY, generator=generator)
    return reference + torch.randn(TOKENS, VOCABULARY, generator=generator), reference


@pytest.fixture
def targets(logits):
    """Every second one is the reference's most probable token."""
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    targets[::2] = logits[1][::2].argmax(dim=-1)
    return targets


def probabilities(row):
    """The softmax of some numbers, in float64."""
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def test_statistics_are_those_of_a_loop(logits, targets):
    found, expected = logits
    measured = compare_logits(found, expected, targets)
    for place in range(TOKENS):
        p = probabilities(expected[place].tolist())
        q = probabilities(found[place].tolist())
        target = targets[place].item()
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        first = q.index(max(q))
        reference_first = p.index(max(p))
        assert measured.divergence[place].item() == near(divergence)
        assert measured.loss[place].item() == near(-math.log(q[target]))
        assert measured.reference_loss[place].item() == near(-math.log(p[target]))
        assert measured.agreement[place].item() == (first == reference_first)
        assert measured.flip[place].item() == ((first == target) ^ (reference_first == target))
    for values in (measured.agreement, measured.flip):
        assert 0 < values.sum() < TOKENS  # the random logits have both cases


def test_the_divergence_is_from_the_reference_to_the_model(logits, targets):
    found, expected = logits
    forward = compare_logits(found, expected, targets).divergence
    backward = compare_logits(expected, found, targets).divergence
    assert not torch.allclose(forward, backward)


def test_equal_logits_have_no_divergence_at_all(logits, targets):
    found, _ = logits
    measured = compare_logits(found, found.clone(), targets)
    assert (measured.divergence == 0).all()
    assert measured.agreement.all()
    assert not measured.flip.any()


def test_a_shift_of_all_logits_changes_nothing_and_is_never_negative(logits, targets):
    """A softmax has no such thing as a level; rounding must not give a divergence below zero."""
    found, _ = logits
    divergence = compare_logits(found, found + 0.3, targets).divergence
    assert (divergence >= 0).all()
    assert divergence.max() < 1e-6  # measured: 2e-7


@pytest.mark.parametrize("rows", [1, 7, TOKENS, 1000])
def test_chunks_of_rows_give_the_same_numbers(rows, logits, targets):
    whole = compare_logits(*logits, targets, rows=TOKENS)
    for name, values in compare_logits(*logits, targets, rows=rows)._asdict().items():
        assert torch.equal(values, getattr(whole, name)), name
    assert torch.equal(token_losses(logits[0], targets, rows=rows), whole.loss)


def test_low_precision_logits_are_compared_in_float32(logits, targets):
    """The two dtypes may differ."""
    found, expected = (part.bfloat16() for part in logits)
    exact = compare_logits(found.float(), expected.float(), targets)
    for name, values in compare_logits(found, expected.float(), targets)._asdict().items():
        assert torch.equal(values, getattr(exact, name)), name
    assert torch.equal(token_losses(found, targets), exact.loss)


def test_four_copies_of_a_few_rows_are_in_memory():
    """The logits are bfloat16, so that a float32 copy of all rows would show."""
    rows = 4
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(64, dtype=torch.long)
    copy_bytes = 4 * rows * logits.shape[1]
    peak = added_peak(lambda: compare_logits(logits, logits, targets, rows))
    assert 3 * copy_bytes < peak < 4.2 * copy_bytes  # the results are 0.02 of a copy


def test_vocabularies_of_two_sizes_are_refused(logits, targets):
    with pytest.raises(ValueError, match=r"\(50, 31\) and the reference's \(50, 30\)"):
        compare_logits(logits[0], logits[1][:, :-1], targets)


def test_the_standard_error_takes_windows_as_the_unit():
    """For windows of equal length it is the standard error of the windows' means."""
    generator = torch.Generator().manual_seed(0)
    windows = list(torch.randn(6, 1, generator=generator) + torch.randn(6, 40, generator=generator))
    means = np.array([window.double().mean().item() for window in windows])
    estimate = mean_over_tokens(windows)
    assert estimate.mean == pytest.approx(means.mean(), rel=1e-12)
    assert estimate.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(6), rel=1e-12)


def test_repeating_each_token_adds_no_certainty():
    windows = [torch.tensor([1.0, 2.0]), torch.tensor([4.0]), torch.tensor([0.0, 3.0, 5.0])]
    repeated = [window.repeat(10) for window in windows]
    assert mean_over_tokens(repeated) == pytest.approx(mean_over_tokens(windows))


def test_the_standard_error_is_the_scatter_of_repeated_measurements():
    """Over 2,000 samples of 12 windows of different lengths, which share a level each."""
    generator = torch.Generator().manual_seed(0)
    lengths = [20, 30, 40] * 4
    estimates = []
    for _ in range(2000):
        windows = [
            3 + torch.randn(1, generator=generator) + torch.randn(length, generator=generator)
            for length in lengths
        ]
        estimates.append(mean_over_tokens(windows))
    scatter = np.std([estimate.mean for estimate in estimates])
    claimed = math.sqrt(np.mean([estimate.stderr**2 for estimate in estimates]))
    assert claimed == pytest.approx(scatter, rel=0.06)  # 1.6 % is one standard deviation


def test_one_window_has_no_standard_error():
    assert mean_over_tokens([torch.tensor([1.0, 2.0])]) == (1.5, None)
    assert perplexity([torch.zeros(3)]) == (1.0, None)


def test_perplexity_has_the_error_of_the_loss_times_itself():
    losses = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])]
    loss = mean_over_tokens(losses)
    value = perplexity(losses)
    assert value.mean == pytest.approx(math.exp(2))
    assert value.stderr == pytest.approx(math.exp(2) * loss.stderr)
    assert perplexity([torch.full((2,), 1000.0)]).mean == math.inf


def test_losses_are_those_of_torch(logits, targets):
    expected = torch.nn.functional.cross_entropy(logits[0], targets, reduction="none")
    assert_close(token_losses(logits[0], targets), expected)
