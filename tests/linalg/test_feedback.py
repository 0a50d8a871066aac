import pytest
import torch
from torch.testing import assert_close

from qrefta.linalg import feedback
from qrefta.linalg.feedback import Feedback, feedback_of, round_columns


def moment_of(width, tokens=200, seed=0, dtype=torch.float64):
    """The second moment of correlated inputs with outlier columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    x[:, ::7] *= 5
    return (x.T @ x / tokens).to(dtype)


def gptq(matrix, moment, damping, rounded):
    """Algorithm 1 of the GPTQ paper, column by column, with an explicit inverse, in float64."""
    W = matrix.double().clone()
    H = moment.double() + damping * moment.diagonal().double().mean() * torch.eye(len(moment))
    V = torch.zeros_like(W)
    for k in range(len(H)):
        inverse = torch.linalg.inv(H[k:, k:])
        V[:, k] = rounded(W[:, k])
        error = (W[:, k] - V[:, k]) / inverse[0, 0]
        W[:, k:] -= torch.outer(error, inverse[0])
    return V


@pytest.mark.parametrize("panel", [3, 16, 512])
@pytest.mark.parametrize("width", [1, 5, 40])
def test_the_factor_multiplies_back_to_the_damped_moment(monkeypatch, panel, width):
    monkeypatch.setattr(feedback, "_FACTOR_PANEL", panel)
    moment = moment_of(width)
    order, unit = feedback_of(moment, 0.1)
    unit = unit.double()
    assert order.tolist() == sorted(range(width), key=lambda k: -moment[k, k])
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(width)
    damped = damped[order][:, order]
    assert_close(unit.diagonal(), torch.ones(width, dtype=torch.float64))
    assert_close(unit, unit.triu())
    # D from the last column back: damped - M D M^T must vanish for the only D that fits.
    inverse = torch.linalg.inv(unit)
    diagonal = inverse @ damped @ inverse.T
    assert_close(diagonal, diagonal.diagonal().diag(), atol=1e-4 * damped.max().item(), rtol=0)


def test_wide_moments_are_factorized_in_float32_as_well():
    moment = moment_of(2050, tokens=300, dtype=torch.float32)
    order, unit = feedback_of(moment, 0.05)
    damped = moment.double() + 0.05 * moment.diagonal().mean() * torch.eye(2050)
    reference = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
    reference = reference / reference.diagonal()
    assert (unit.double() - reference).norm() / reference.norm() < 1e-4


def test_a_moment_of_zeros_gives_the_identity():
    order, unit = feedback_of(torch.zeros(6, 6), 0.01)
    assert order.tolist() == list(range(6))
    assert torch.equal(unit, torch.eye(6))


def test_an_indefinite_moment_is_an_error():
    moment = torch.ones(4, 4) - 3 * torch.eye(4) + torch.diag(torch.tensor([9.0, 0, 0, 0]))
    with pytest.raises(torch.linalg.LinAlgError):
        feedback_of(moment, 0.0)


@pytest.mark.parametrize(("near", "far"), [(4, 12), (4, 30), (64, 512)])
@pytest.mark.parametrize(("rows", "width"), [(9, 30), (1, 17), (20, 1)])
def test_columns_are_rounded_as_by_gptq(monkeypatch, near, far, rows, width):
    monkeypatch.setattr(feedback, "_NEAR", near)
    monkeypatch.setattr(feedback, "_FAR", far)
    matrix = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    moment = moment_of(width)
    found = torch.empty_like(matrix)

    def round_column(k, target):
        found[:, k] = (target * 2).round() / 2
        return found[:, k]

    round_columns(matrix, feedback_of(moment, 0.01), round_column)
    order = moment.diagonal().argsort(descending=True)
    permuted = moment[order][:, order]
    expected = gptq(matrix[:, order], permuted, 0.01, lambda column: (column * 2).round() / 2)
    assert_close(found.double()[:, order], expected)


def test_columns_are_visited_in_the_order_of_the_feedback_and_the_first_is_untouched():
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 0, 4, 2, 1])
    seen = []

    def round_column(k, target):
        seen.append(k)
        if k == 3:
            assert torch.equal(target, matrix[:, 3])
        return target

    round_columns(matrix, Feedback(order, torch.eye(5)), round_column)
    assert seen == order.tolist()
