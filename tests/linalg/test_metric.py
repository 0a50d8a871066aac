"""The metric of second moments, beside its definition in float64."""

import pytest
import torch
from torch.testing import assert_close

from qrefta.linalg import metric
from qrefta.linalg.metric import RIDGE, Metric, normalized, output_error, roots

WIDTH = 24


def samples(rows, seed=0):
    """Inputs, (rows, in), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)


def moment_of(x):
    return x.T @ x / len(x)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_normalized_moment_has_a_unit_diagonal_and_bounded_eigenvalues(rows):
    found = normalized(1e3 * moment_of(samples(rows)))
    assert found.diagonal().mean().item() == pytest.approx(1)
    # Rounding of a singular matrix may take 1e-15 of the largest eigenvalue, about 24.
    assert torch.linalg.eigvalsh(found).min() >= RIDGE / (1 + RIDGE) - 1e-13


def test_normalized_moment_does_not_depend_on_the_scale():
    moment = moment_of(samples(40))
    assert_close(normalized(1e6 * moment), normalized(moment))


def test_normalized_diagonal_is_the_diagonal_of_the_full_moment():
    diagonal = moment_of(samples(40)).diagonal()
    assert_close(normalized(diagonal), normalized(diagonal.diag()).diagonal())


@pytest.mark.parametrize("shape", [(WIDTH,), (WIDTH, WIDTH)], ids=str)
def test_inputs_that_are_zero_count_as_the_identity(shape):
    expected = torch.ones(WIDTH) if len(shape) == 1 else torch.eye(WIDTH)
    assert_close(normalized(torch.zeros(shape)), expected)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_roots_are_roots_and_inverses(rows):
    matrix = normalized(moment_of(samples(rows)))
    root, inverse_root = roots(matrix)
    assert_close(root @ root, matrix)
    assert_close(root @ inverse_root, torch.eye(WIDTH, dtype=torch.float64))


def test_roots_of_a_diagonal_are_the_roots_of_the_diagonal_matrix():
    diagonal = normalized(moment_of(samples(40)).diagonal())
    for found, expected in zip(roots(diagonal), roots(diagonal.diag()), strict=True):
        assert_close(found, expected.diagonal())


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_and_its_inverse_keep_the_dtype_of_the_vectors(full, dtype):
    moment = moment_of(samples(40))
    made = Metric(
        *(root.float() for root in roots(normalized(moment if full else moment.diagonal())))
    )
    vectors = samples(3).T.to(dtype)
    dense_root = made.root if full else made.root.diag()
    assert_close(made.apply(vectors), dense_root.to(dtype) @ vectors)
    assert_close(made.apply_inverse(made.apply(vectors)), vectors, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 1000], ids=["chunks of 3 rows", "one chunk"])
def test_output_error_is_the_error_of_the_outputs(rows, monkeypatch):
    monkeypatch.setattr(metric, "_ROWS", rows)
    monkeypatch.setattr(metric, "_COLUMNS", 7)
    x = samples(50)
    errors = samples(10, seed=1).float()
    moment = moment_of(x).float()
    expected = (x @ errors.double().T).square().sum().item() / 50
    assert output_error(errors, moment) == pytest.approx(expected, rel=1e-5)
    diagonal = (errors.double().square() * moment.double().diagonal()).sum().item()
    assert output_error(errors, moment.diagonal()) == pytest.approx(diagonal, rel=1e-5)
