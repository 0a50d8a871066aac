import numpy as np
import pytest
import scipy.fft
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from qrefta.choices import TRANSFORMS
from qrefta.linalg import tsvd as tensor_module
from qrefta.linalg.metric import Metric
from qrefta.linalg.slices import Slices
from qrefta.linalg.tsvd import mix, mode3_gram, refit, t_svd, t_svd_exact
from tests.stacks import blocks_of, slices_of, svd_of, transform_of

# (layers, out, in): one layer, one row, one column, square, tall, wide, more layers than values in
# a slice
SHAPES = [(1, 5, 7), (3, 1, 6), (3, 6, 1), (4, 5, 5), (3, 9, 4), (3, 4, 9), (12, 3, 2)]
grid = pytest.mark.parametrize("shape", SHAPES, ids=str)
all_transforms = pytest.mark.parametrize("transform", TRANSFORMS)


def random_stack(shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slice_values(stack, transform):
    """Singular values of every transformed slice, (slices, min(out, in))."""
    return torch.stack([torch.linalg.svdvals(mix(stack, transform)[k]) for k in range(len(stack))])


def max_rank(stack):
    return stack.shape[0] * min(stack.shape[1:])


def principal_part(stack, transform, rank):
    """sum_c U[l, k(c)] s_c u_c v_c: (layers, out, in)."""
    U = transform_of(stack, transform)
    found = svd_of(stack, U, rank)
    return torch.einsum(
        "lc,oc,c,ci->loi", U[:, found.slices], found.left, found.values, found.right
    )


def reference(stack, transform, rank):
    """The strongest components of a loop of numpy SVDs: values, slices and their tensor."""
    U = transform_of(stack, transform).numpy()
    W = stack.numpy()
    components = []
    for k in range(len(W)):
        left, values, right = np.linalg.svd(
            sum(U[i, k] * W[i] for i in range(len(W))), full_matrices=False
        )
        components += [(-values[j], k, j, left[:, j], right[j]) for j in range(len(values))]
    components = sorted(components, key=lambda component: component[:3])[:rank]
    total = sum(-s * np.einsum("l,o,i->loi", U[:, k], u, v) for s, k, _, u, v in components)
    return (
        torch.tensor([-c[0] for c in components]),
        torch.tensor([c[1] for c in components]),
        torch.from_numpy(total),
    )


@grid
@all_transforms
def test_transform_is_orthogonal(shape, transform):
    U = transform_of(random_stack(shape), transform)
    assert_close(U.T @ U, torch.eye(shape[0], dtype=torch.float64))


@grid
@all_transforms
def test_transformed_slices_keep_the_energy(shape, transform):
    stack = random_stack(shape)
    values = slice_values(stack, transform_of(stack, transform))
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
def test_kept_energy_is_the_energy_of_the_largest_values_of_all_slices(shape, transform):
    stack = random_stack(shape)
    rank = max(1, max_rank(stack) // 2)
    largest = (
        slice_values(stack, transform_of(stack, transform))
        .flatten()
        .sort(descending=True)
        .values[:rank]
    )
    assert_close(svd_of(stack, transform_of(stack, transform), rank).values, largest)
    assert_close(principal_part(stack, transform, rank).square().sum(), largest.square().sum())


@grid
@all_transforms
def test_every_rank_gives_exactly_that_many_components(shape, transform):
    stack = random_stack(shape)
    U = transform_of(stack, transform)
    for rank in range(1, max_rank(stack) + 1):
        found = svd_of(stack, U, rank)
        assert found.left.shape == (shape[1], rank)
        assert found.right.shape == (rank, shape[2])
        assert found.values.shape == found.slices.shape == (rank,)
        assert (found.values.diff() <= 0).all()


@grid
@all_transforms
def test_vectors_are_orthonormal_within_a_slice(shape, transform):
    stack = random_stack(shape)
    found = svd_of(stack, transform_of(stack, transform), max_rank(stack))
    for k in range(shape[0]):
        left = found.left[:, found.slices == k]
        right = found.right[found.slices == k]
        assert_close(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64))
        assert_close(right @ right.T, torch.eye(left.shape[1], dtype=torch.float64))


@grid
@all_transforms
def test_t_svd_equals_a_loop_of_numpy_svds(shape, transform):
    stack = random_stack(shape)
    for rank in {1, 1 + max_rank(stack) // 2}:
        values, slices, total = reference(stack, transform, rank)
        found = svd_of(stack, transform_of(stack, transform), rank)
        assert_close(found.values, values)
        assert_close(found.slices, slices)
        assert_close(principal_part(stack, transform, rank), total)


@grid
@all_transforms
def test_transformed_slices_equal_tensorly_mode_products(shape, transform):
    """Our first axis (layers) is the tensor's third mode; tensorly counts it as mode 0."""
    stack = random_stack(shape)
    U = transform_of(stack, transform)
    expected = torch.from_numpy(tensorly.tenalg.mode_dot(stack.numpy(), U.T.numpy(), mode=0))
    assert_close(torch.stack([mix(stack, U)[k] for k in range(shape[0])]), expected)


@pytest.mark.parametrize("shape", [(4, 5, 5), (3, 9, 4), (6, 4, 9)], ids=str)
def test_lsm3_is_the_left_singular_vectors_of_the_mode_3_unfolding(shape):
    stack = random_stack(shape)
    left = np.linalg.svd(tensorly.unfold(stack.numpy(), 0), full_matrices=False)[0]
    signs = np.sign(left[np.abs(left).argmax(0), np.arange(shape[0])])
    assert_close(transform_of(stack, "lsm3"), torch.from_numpy(left * signs))


@grid
def test_lsm3_slices_hold_falling_and_most_energy(shape):
    """Ky Fan: no orthogonal transform puts more energy into its first n slices, whatever n."""
    stack = random_stack(shape)
    energy = slice_values(stack, transform_of(stack, "lsm3")).square().sum(1)
    assert (energy.diff() <= 1e-12).all()
    for other in ("dct", "identity"):
        others = slice_values(stack, transform_of(stack, other)).square().sum(1)
        assert (energy.cumsum(0) >= others.sort(descending=True).values.cumsum(0) - 1e-12).all()


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
def test_dct_is_the_cosine_formula(layers):
    """DCT-II: U[l, k] = c_k cos(pi k (2 l + 1) / (2 K)), c_0 = sqrt(1 / K), else sqrt(2 / K)."""
    U = transform_of(random_stack((layers, 2, 2)), "dct")
    for k in range(layers):
        scale = np.sqrt((1 if k == 0 else 2) / layers)
        wave = [scale * np.cos(np.pi * k * (2 * i + 1) / (2 * layers)) for i in range(layers)]
        assert_close(U[:, k], torch.tensor(wave, dtype=torch.float64))


def test_identity_mixes_nothing():
    stack = random_stack((3, 4, 5))
    U = transform_of(stack, "identity")
    assert all(torch.equal(mix(stack, U)[k], stack[k]) for k in range(3))


@all_transforms
def test_one_layer_is_the_plain_svd(transform):
    stack = random_stack((1, 6, 9))
    left, values, right = np.linalg.svd(stack[0].numpy(), full_matrices=False)
    assert_close(
        svd_of(stack, transform_of(stack, transform), 4).values, torch.from_numpy(values[:4])
    )
    plain = torch.from_numpy(left[:, :4] * values[:4] @ right[:4])
    assert_close(principal_part(stack, transform, 4)[0], plain)


def test_ties_go_to_the_lower_slice_then_the_lower_index():
    stack = torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64)).repeat(3, 1, 1)
    found = svd_of(stack, transform_of(stack, "identity"), 6)
    assert_close(found.values, torch.tensor([3.0, 3, 3, 2, 2, 2], dtype=torch.float64))
    assert found.slices.tolist() == [0, 1, 2, 0, 0, 1]
    assert_close(found.right.abs().argmax(1), found.left.abs().argmax(0))


def test_a_slice_may_get_no_component():
    stack = random_stack((3, 4, 4)) * torch.tensor([1.0, 1e-3, 1.0], dtype=torch.float64).view(
        3, 1, 1
    )
    found = svd_of(stack, transform_of(stack, "identity"), 8)
    assert set(found.slices.tolist()) == {0, 2}


@all_transforms
def test_signs_are_fixed_and_results_repeat(transform):
    """A negated stack has the same left vectors and negated right vectors.

    The same stack has the same bits.
    """
    stack = random_stack((4, 6, 5))
    U = transform_of(stack, transform)
    first = svd_of(stack, U, 9)
    again = svd_of(stack.clone(), U, 9)
    negated = svd_of(-stack, U, 9)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(transform_of(stack.clone(), transform), U)
    peaks = first.left.gather(0, first.left.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()
    assert_close(negated.left, first.left)
    assert_close(negated.right, -first.right)


def test_lsm3_signs_are_fixed():
    U = transform_of(random_stack((6, 4, 5)), "lsm3")
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


@all_transforms
def test_zero_stack_has_zero_values_and_no_nan(transform):
    stack = torch.zeros(3, 4, 5, dtype=torch.float64)
    U = transform_of(stack, transform)
    found = svd_of(stack, U, 7)
    assert_close(U.T @ U, torch.eye(3, dtype=torch.float64))
    assert found.values.tolist() == [0.0] * 7
    assert torch.isfinite(found.left).all()
    assert torch.isfinite(found.right).all()


@pytest.mark.parametrize("transform", ["lsm3", "dct"])
def test_equal_layers_fall_into_the_first_slice(transform):
    """Both transforms find the mean of equal layers: U[:, 0] = 1 / sqrt(K), in one slice."""
    stack = random_stack((1, 4, 6)).repeat(5, 1, 1)
    U = transform_of(stack, transform)
    assert_close(U[:, 0], torch.full((5,), 5**-0.5, dtype=torch.float64))
    assert svd_of(stack, U, 4).slices.tolist() == [0] * 4
    assert_close(principal_part(stack, transform, 4), stack)


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_gram_in_chunks_equals_the_direct_product(monkeypatch, chunk):
    monkeypatch.setattr(tensor_module, "_GRAM_CHUNK", chunk)
    stack = random_stack((4, 5, 6))
    unfolding = tensorly.unfold(stack.numpy(), 0)
    assert_close(
        mode3_gram(blocks_of(stack), len(stack)), torch.from_numpy(unfolding @ unfolding.T)
    )


def test_gram_of_float32_is_summed_in_float64():
    """A stack of one large and 63 small entries shows the dtype of the sum.

    In float32 10^8 + 1 is 10^8.
    """
    stack = torch.ones(1, 8, 8)
    stack[0, 0, 0] = 1e4
    assert mode3_gram(blocks_of(stack), len(stack)).item() == 1e8 + 63


def test_layout_of_the_stack_does_not_matter():
    stack = random_stack((3, 5, 4))
    strided = stack.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(
        mode3_gram(blocks_of(strided), len(strided)), mode3_gram(blocks_of(stack), len(stack))
    )
    U = transform_of(stack, "lsm3")
    assert_close(slice_values(strided, U), slice_values(stack, U))


@all_transforms
def test_a_float32_stack_is_decomposed_in_float64(transform):
    stack = random_stack((3, 5, 4)).float()
    U = transform_of(stack, transform)
    found = svd_of(stack, U, 5)
    assert U.dtype == found.left.dtype == found.values.dtype == found.right.dtype == torch.float64
    assert_close(found.values, svd_of(stack.double(), U, 5).values, rtol=1e-6, atol=1e-6)


def test_unknown_transform_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'dft'; it must be one of lsm3, dct, identity"):
        transform_of(random_stack((2, 2, 2)), "dft")


# The block method, on slices that are large enough for it


def falling(layers, out, inner, power, scales=None, seed=0):
    """Slices with singular values scale * i^-power."""
    generator = torch.Generator().manual_seed(seed)
    width = min(out, inner)
    values = torch.arange(1, width + 1, dtype=torch.float64) ** -power

    def orthonormal(rows):
        return torch.linalg.qr(torch.randn(rows, width, dtype=torch.float64, generator=generator)).Q

    parts = [orthonormal(out) * values @ orthonormal(inner).T for _ in range(layers)]
    return torch.stack(
        [part * scale for part, scale in zip(parts, scales or [1.0] * layers, strict=True)]
    )


def energy_share(stack, rank, **options):
    U = transform_of(stack, "identity")
    found, _ = t_svd(slices_of(stack, U, **options), rank, seed=0)
    exact = t_svd_exact(slices_of(stack, U), rank)
    return (found.values.square().sum() / exact.values.square().sum()).item()


@pytest.mark.parametrize("power", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(
    "shape", [(4, 200, 200), (3, 331, 173), (2, 150, 301), (1, 256, 256)], ids=str
)
@pytest.mark.parametrize("rank", [1, 40])
def test_block_method_captures_the_energy(power, shape, rank):
    stack = random_stack(shape) if power == 0 else falling(*shape, power)
    assert 0.999 <= energy_share(stack, rank) <= 1 + 1e-9


def test_block_method_captures_the_energy_of_large_slices():
    """4096 x 4096 with known singular values: two cosine bases with random signs around them.

    The values fall slowly, which is the hard case.
    """
    size = 4096
    rank = 64
    values = (torch.arange(1, size + 1, dtype=torch.float32) ** -0.3).numpy()
    signs = np.random.default_rng(0).choice(np.float32([-1, 1]), size=(2, size))
    left = scipy.fft.dct(np.diag(values * signs[0]), axis=0, norm="ortho")
    stack = torch.from_numpy(scipy.fft.dct(left * signs[1], axis=1, norm="ortho")).unsqueeze(0)
    found, _ = t_svd(slices_of(stack, transform_of(stack, "identity")), rank, seed=0)
    share = found.values.square().sum().item() / np.square(values[:rank], dtype=np.float64).sum()
    assert 0.999 <= share <= 1 + 1e-4


@given(
    layers=st.sampled_from([1, 2, 3, 7, 80]),
    shape=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    part=st.floats(0.001, 1),
    power=st.sampled_from([0.0, 0.4, 1.5]),
    spoilt=st.sampled_from(["nothing", "zero slices", "constant slices", "rank one"]),
    transform=st.sampled_from(TRANSFORMS),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_stack_against_numpy(layers, shape, part, power, spoilt, transform):
    """Orthonormal within each slice, with the energy of numpy's SVDs.

    The squared error is the rest of the energy.
    """
    stack = random_stack((layers, *shape)) * torch.arange(1, shape[1] + 1) ** -power
    if spoilt != "nothing":
        stack[::2] = {"zero slices": 0.0, "constant slices": 0.1, "rank one": stack[0, :1]}[spoilt]
    rank = max(1, int(part * min(max_rank(stack), 200)))
    U = transform_of(stack, transform)
    found = svd_of(stack, U, rank)
    values = np.concatenate(
        [np.linalg.svd(matrix, compute_uv=False) for matrix in mix(stack, U).numpy()]
    )
    exact = np.square(np.sort(values)[::-1][:rank]).sum()
    total = stack.square().sum().item()
    energy = found.values.square().sum().item()
    assert len(found.values) == rank
    assert (found.values.diff() <= 1e-9 * (1 + found.values[0])).all()
    assert 0.999 * exact - 1e-9 * total <= energy <= exact * (1 + 1e-6) + 1e-12
    for k in found.slices.unique():
        right = found.right[found.slices == k]
        assert_close(right @ right.T, torch.eye(len(right), dtype=torch.float64), atol=1e-6, rtol=0)
    principal = torch.einsum(
        "lc,oc,c,ci->loi", U[:, found.slices], found.left, found.values, found.right
    )
    assert (stack - principal).square().sum().item() == pytest.approx(
        total - energy, rel=1e-5, abs=1e-5 * total
    )


@pytest.mark.parametrize("rows", [1, 33, 100])
def test_blocks_of_rows_change_nothing_but_rounding(rows):
    stack = falling(3, 200, 180, 0.6)
    assert energy_share(stack, 12, rows=rows) == pytest.approx(energy_share(stack, 12), abs=1e-9)


def test_a_slice_that_needs_all_the_rank_gets_wider_blocks():
    stack = falling(12, 200, 200, 0.2, scales=[1.0] + [1e-4] * 11)
    found, _ = t_svd(slices_of(stack, transform_of(stack, "identity")), 60, seed=0)
    assert found.slices.tolist() == [0] * 60
    assert energy_share(stack, 60) >= 0.999


def test_equal_singular_values_are_all_found():
    """A Krylov space holds no more of one value's directions than its blocks are wide."""
    stack = torch.zeros(8, 150, 150, dtype=torch.float64)
    stack[0] = torch.linalg.qr(random_stack((1, 150, 150))[0]).Q
    assert energy_share(stack, 50) == pytest.approx(1)


def test_rank_deficient_and_zero_slices_give_no_nan():
    stack = torch.zeros(4, 200, 200, dtype=torch.float64)
    stack[1] = torch.outer(*random_stack((2, 200)))
    found, _ = t_svd(slices_of(stack, transform_of(stack, "identity")), 20, seed=0)
    assert all(torch.isfinite(part).all() for part in found)
    assert_close(found.values[0], stack[1].norm())
    assert found.values[1:].max() < 1e-6 * found.values[0]


def test_the_seed_decides_the_bits_and_not_the_result():
    stack = falling(3, 200, 200, 0.3)
    slices = slices_of(stack, transform_of(stack, "lsm3"))
    first, again, other = (t_svd(slices, 20, seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.left, other.left)
    assert_close(first.values.square().sum(), other.values.square().sum(), rtol=2e-3, atol=0)


def columns_multiplied(monkeypatch, stack, rank):
    """Columns that each slice was multiplied with."""
    counts = torch.zeros(len(stack), dtype=torch.long)
    real = Slices.multiply

    def counted(slices, vectors):
        counts.add_(torch.tensor([v.shape[1] for v in vectors]))
        return real(slices, vectors)

    with monkeypatch.context() as patch:
        patch.setattr(Slices, "multiply", counted)
        t_svd(slices_of(stack, transform_of(stack, "identity")), rank, seed=0)
    return counts


def test_slices_that_cannot_matter_are_left_alone(monkeypatch):
    counts = columns_multiplied(
        monkeypatch, falling(6, 200, 200, 0.3, scales=[1, 1, 1, 0.01, 0.01, 0.01]), 30
    )
    assert counts[3:].max() < counts[:3].min() / 2


def test_work_does_not_grow_with_layers_times_rank(monkeypatch):
    few, many = (
        columns_multiplied(monkeypatch, falling(k, 260, 260, 0.5), 48).sum() for k in (2, 12)
    )
    assert many < 4 * few


@pytest.mark.parametrize("size", [20, 200])
def test_a_metric_weights_the_right_side(size):
    """The principal part times S^(1/2) is the principal part of T_k S^(1/2)."""
    stack = falling(2, size, size, 0.8)
    root = torch.linspace(0.5, 3, size, dtype=torch.float64)
    U = transform_of(stack, "identity")
    found, _ = t_svd(slices_of(stack, U, metric=Metric(root, 1 / root)), 12, seed=0)
    weighted = t_svd_exact(slices_of(stack * root, U), 12)
    assert (found.values.square().sum() / weighted.values.square().sum()).item() == pytest.approx(
        1, abs=1e-3
    )
    for index in range(2):
        mine = found.slices == index
        principal = found.left[:, mine] * found.values[mine] @ found.right[mine]
        expected = (stack[index] * root).square().sum() - found.values[mine].square().sum()
        assert_close(((stack[index] - principal) * root).square().sum(), expected)


def test_refits_never_lose_and_converge():
    stack = falling(3, 200, 200, 0.2)
    slices = slices_of(stack, transform_of(stack, "identity"))
    starts = [torch.linalg.qr(random_stack((200, 14), seed=k)).Q for k in range(3)]
    energies = []
    for _ in range(12):
        found, starts = refit(slices, 24, starts)
        energies.append(found.values.square().sum().item())
    assert energies == sorted(energies)
    assert energies[-1] >= 0.999 * t_svd_exact(slices, 24).values.square().sum().item()
