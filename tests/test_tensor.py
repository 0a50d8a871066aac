import numpy as np
import pytest
import tensorly
import torch
from torch.testing import assert_close

from qrefta import tensor as tensor_module
from qrefta.tensor import TRANSFORMS, mode3_gram, t_svd, transform_matrix, transformed_slice

# (layers, out, in): one layer, one row, one column, square, tall, wide, more layers than values in a slice
SHAPES = [(1, 5, 7), (3, 1, 6), (3, 6, 1), (4, 5, 5), (3, 9, 4), (3, 4, 9), (12, 3, 2)]
grid = pytest.mark.parametrize("shape", SHAPES, ids=str)
all_transforms = pytest.mark.parametrize("transform", TRANSFORMS)


def random_stack(shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slice_values(stack, transform):
    """Singular values of every transformed slice, (slices, min(out, in))."""
    return torch.stack([torch.linalg.svdvals(transformed_slice(stack, transform, k)) for k in range(len(stack))])


def max_rank(stack):
    return stack.shape[0] * min(stack.shape[1:])


def principal_part(stack, transform, rank):
    """sum_c U[l, k(c)] s_c u_c v_c: (layers, out, in)."""
    U = transform_matrix(stack, transform)
    found = t_svd(stack, U, rank)
    return torch.einsum("lc,oc,c,ci->loi", U[:, found.slices], found.left, found.values, found.right)


def reference(stack, transform, rank):
    """The strongest components of a loop of numpy SVDs: values, slices and the tensor that they make."""
    U, W = transform_matrix(stack, transform).numpy(), stack.numpy()
    components = []
    for k in range(len(W)):
        left, values, right = np.linalg.svd(sum(U[i, k] * W[i] for i in range(len(W))), full_matrices=False)
        components += [(-values[j], k, j, left[:, j], right[j]) for j in range(len(values))]
    components = sorted(components, key=lambda component: component[:3])[:rank]
    total = sum(-s * np.einsum("l,o,i->loi", U[:, k], u, v) for s, k, _, u, v in components)
    return torch.tensor([-c[0] for c in components]), torch.tensor([c[1] for c in components]), torch.from_numpy(total)


@grid
@all_transforms
def test_transform_is_orthogonal(shape, transform):
    U = transform_matrix(random_stack(shape), transform)
    assert_close(U.T @ U, torch.eye(shape[0], dtype=torch.float64))


@grid
@all_transforms
def test_transformed_slices_keep_the_energy(shape, transform):
    stack = random_stack(shape)
    values = slice_values(stack, transform_matrix(stack, transform))
    assert values.shape == (shape[0], min(shape[1:]))
    assert_close(values.square().sum(), stack.square().sum())


@grid
@all_transforms
def test_full_rank_reconstructs(shape, transform):
    stack = random_stack(shape)
    assert_close(principal_part(stack, transform, max_rank(stack)), stack)


@grid
@all_transforms
def test_residual_and_principal_part_are_orthogonal(shape, transform):
    """Orthogonal U and singular vectors: the squared norms add up, with no constant to tune."""
    stack = random_stack(shape)
    principal = principal_part(stack, transform, rank=max(1, max_rank(stack) // 3))
    residual = stack - principal
    assert_close(residual.square().sum() + principal.square().sum(), stack.square().sum())
    assert_close((residual * principal).sum(), torch.tensor(0.0, dtype=torch.float64))


@grid
@all_transforms
def test_kept_energy_is_that_of_the_largest_values_over_all_slices(shape, transform):
    stack = random_stack(shape)
    rank = max(1, max_rank(stack) // 2)
    largest = slice_values(stack, transform_matrix(stack, transform)).flatten().sort(descending=True).values[:rank]
    assert_close(t_svd(stack, transform_matrix(stack, transform), rank).values, largest)
    assert_close(principal_part(stack, transform, rank).square().sum(), largest.square().sum())


@grid
@all_transforms
def test_every_rank_gives_exactly_that_many_components(shape, transform):
    stack = random_stack(shape)
    U = transform_matrix(stack, transform)
    for rank in range(1, max_rank(stack) + 1):
        found = t_svd(stack, U, rank)
        assert found.left.shape == (shape[1], rank)
        assert found.right.shape == (rank, shape[2])
        assert found.values.shape == found.slices.shape == (rank,)
        assert (found.values.diff() <= 0).all()


@grid
@all_transforms
def test_vectors_are_orthonormal_within_a_slice(shape, transform):
    stack = random_stack(shape)
    found = t_svd(stack, transform_matrix(stack, transform), max_rank(stack))
    for k in range(shape[0]):
        left, right = found.left[:, found.slices == k], found.right[found.slices == k]
        assert_close(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64))
        assert_close(right @ right.T, torch.eye(left.shape[1], dtype=torch.float64))


@grid
@all_transforms
def test_t_svd_equals_a_loop_of_numpy_svds(shape, transform):
    stack = random_stack(shape)
    for rank in {1, 1 + max_rank(stack) // 2}:
        values, slices, total = reference(stack, transform, rank)
        found = t_svd(stack, transform_matrix(stack, transform), rank)
        assert_close(found.values, values)
        assert_close(found.slices, slices)
        assert_close(principal_part(stack, transform, rank), total)


@grid
@all_transforms
def test_transformed_slices_equal_tensorly_mode_products(shape, transform):
    """Our first axis (layers) is the tensor's third mode; tensorly counts it as mode 0."""
    stack = random_stack(shape)
    U = transform_matrix(stack, transform)
    expected = torch.from_numpy(tensorly.tenalg.mode_dot(stack.numpy(), U.T.numpy(), mode=0))
    assert_close(torch.stack([transformed_slice(stack, U, k) for k in range(shape[0])]), expected)


@pytest.mark.parametrize("shape", [(4, 5, 5), (3, 9, 4), (6, 4, 9)], ids=str)
def test_lsm3_is_the_left_singular_vectors_of_the_mode_3_unfolding(shape):
    stack = random_stack(shape)
    left = np.linalg.svd(tensorly.unfold(stack.numpy(), 0), full_matrices=False)[0]
    signs = np.sign(left[np.abs(left).argmax(0), np.arange(shape[0])])
    assert_close(transform_matrix(stack, "lsm3"), torch.from_numpy(left * signs))


@grid
def test_lsm3_slices_hold_falling_and_most_energy(shape):
    """Ky Fan: no orthogonal transform puts more energy into its first n slices, whatever n."""
    stack = random_stack(shape)
    energy = slice_values(stack, transform_matrix(stack, "lsm3")).square().sum(1)
    assert (energy.diff() <= 1e-12).all()
    for other in ("dct", "identity"):
        others = slice_values(stack, transform_matrix(stack, other)).square().sum(1)
        assert (energy.cumsum(0) >= others.sort(descending=True).values.cumsum(0) - 1e-12).all()


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
def test_dct_is_the_cosine_formula(layers):
    """DCT-II: U[l, k] = c_k cos(pi k (2 l + 1) / (2 K)), c_0 = sqrt(1 / K), else sqrt(2 / K)."""
    U = transform_matrix(random_stack((layers, 2, 2)), "dct")
    for k in range(layers):
        scale = np.sqrt((1 if k == 0 else 2) / layers)
        wave = [scale * np.cos(np.pi * k * (2 * i + 1) / (2 * layers)) for i in range(layers)]
        assert_close(U[:, k], torch.tensor(wave, dtype=torch.float64))


def test_identity_mixes_nothing():
    stack = random_stack((3, 4, 5))
    U = transform_matrix(stack, "identity")
    assert all(torch.equal(transformed_slice(stack, U, k), stack[k]) for k in range(3))


@all_transforms
def test_one_layer_is_the_plain_svd(transform):
    stack = random_stack((1, 6, 9))
    left, values, right = np.linalg.svd(stack[0].numpy(), full_matrices=False)
    assert_close(t_svd(stack, transform_matrix(stack, transform), 4).values, torch.from_numpy(values[:4]))
    plain = torch.from_numpy(left[:, :4] * values[:4] @ right[:4])
    assert_close(principal_part(stack, transform, 4)[0], plain)


def test_ties_go_to_the_lower_slice_then_the_lower_index():
    stack = torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64)).repeat(3, 1, 1)
    found = t_svd(stack, transform_matrix(stack, "identity"), 6)
    assert_close(found.values, torch.tensor([3.0, 3, 3, 2, 2, 2], dtype=torch.float64))
    assert found.slices.tolist() == [0, 1, 2, 0, 0, 1]
    assert_close(found.right.abs().argmax(1), found.left.abs().argmax(0))


def test_a_slice_may_get_no_component():
    stack = random_stack((3, 4, 4)) * torch.tensor([1.0, 1e-3, 1.0], dtype=torch.float64).view(3, 1, 1)
    found = t_svd(stack, transform_matrix(stack, "identity"), 8)
    assert set(found.slices.tolist()) == {0, 2}


@all_transforms
def test_signs_are_fixed_and_results_repeat(transform):
    """The negated stack has the same left vectors and negated right ones; the same stack has the same bits."""
    stack = random_stack((4, 6, 5))
    U = transform_matrix(stack, transform)
    first, again, negated = t_svd(stack, U, 9), t_svd(stack.clone(), U, 9), t_svd(-stack, U, 9)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(transform_matrix(stack.clone(), transform), U)
    peaks = first.left.gather(0, first.left.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()
    assert_close(negated.left, first.left)
    assert_close(negated.right, -first.right)


def test_lsm3_signs_are_fixed():
    U = transform_matrix(random_stack((6, 4, 5)), "lsm3")
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


@all_transforms
def test_zero_stack_has_zero_values_and_no_nan(transform):
    stack = torch.zeros(3, 4, 5, dtype=torch.float64)
    U = transform_matrix(stack, transform)
    found = t_svd(stack, U, 7)
    assert_close(U.T @ U, torch.eye(3, dtype=torch.float64))
    assert found.values.tolist() == [0.0] * 7
    assert torch.isfinite(found.left).all()
    assert torch.isfinite(found.right).all()


@pytest.mark.parametrize("transform", ["lsm3", "dct"])
def test_equal_layers_fall_into_the_first_slice(transform):
    """Both transforms find the mean of equal layers: U[:, 0] = 1 / sqrt(K), and one slice holds all."""
    stack = random_stack((1, 4, 6)).repeat(5, 1, 1)
    U = transform_matrix(stack, transform)
    assert_close(U[:, 0], torch.full((5,), 5**-0.5, dtype=torch.float64))
    assert t_svd(stack, U, 4).slices.tolist() == [0] * 4
    assert_close(principal_part(stack, transform, 4), stack)


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_gram_in_chunks_equals_the_direct_product(monkeypatch, chunk):
    monkeypatch.setattr(tensor_module, "_GRAM_CHUNK", chunk)
    stack = random_stack((4, 5, 6))
    unfolding = tensorly.unfold(stack.numpy(), 0)
    assert_close(mode3_gram(stack), torch.from_numpy(unfolding @ unfolding.T))


def test_gram_of_float32_is_summed_in_float64():
    """10^8 + 1 is lost in float32: a stack of one large and 63 small entries shows the dtype of the sum."""
    stack = torch.ones(1, 8, 8)
    stack[0, 0, 0] = 1e4
    assert mode3_gram(stack).item() == 1e8 + 63


def test_layout_of_the_stack_does_not_matter():
    stack = random_stack((3, 5, 4))
    strided = stack.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(mode3_gram(strided), mode3_gram(stack))
    U = transform_matrix(stack, "lsm3")
    assert_close(slice_values(strided, U), slice_values(stack, U))


@all_transforms
def test_output_dtype_is_the_stacks(transform):
    stack = random_stack((3, 5, 4)).float()
    U = transform_matrix(stack, transform)
    found = t_svd(stack, U, 5)
    assert U.dtype == torch.float64
    assert found.left.dtype == found.values.dtype == found.right.dtype == torch.float32
    assert_close(found.values, t_svd(stack.double(), U, 5).values.float())


def test_unknown_transform_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'dft'; it must be one of lsm3, dct, identity"):
        transform_matrix(random_stack((2, 2, 2)), "dft")
