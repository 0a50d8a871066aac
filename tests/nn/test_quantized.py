import math
from itertools import product

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.nn.functional import linear
from torch.testing import assert_close

from qrefta.choices import QUANT_TYPES, bits_of
from qrefta.nn import packing, quantized
from qrefta.nn.quantize import Rounding, quantize, rounded
from qrefta.nn.quantized import BLOCK_SIZES, QuantFormat, frozen_weight

FORMATS = [
    QuantFormat(kind, 64, double)
    for kind in QUANT_TYPES
    for double in (False, True)
    if double or bits_of(kind) == 4
]
all_formats = pytest.mark.parametrize(
    "fmt", FORMATS, ids=lambda fmt: fmt.quant_type + "-double" * fmt.double_quant
)
all_types = pytest.mark.parametrize("kind", QUANT_TYPES)
bnb_types = pytest.mark.parametrize("kind", ["nf4", "fp4"])
# 160 % 64 == 32 is where bitsandbytes' CPU kernel is wrong; then odd, ragged, smaller than a block,
# one value.
AWKWARD = [(8, 160), (100, 100), (37, 41), (5, 3), (1, 1), (3, 64), (64, 65)]
awkward = pytest.mark.parametrize("shape", AWKWARD, ids=str)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PLAIN = Rounding()
SEARCHED = Rounding(search=True)


def round_trip(matrix, fmt, dtype=torch.float32, rounding=PLAIN):
    return quantize(matrix, fmt, rounding).dequantize(dtype)


LEVELS = {
    "int4": torch.arange(-8, 8) / 8,
    "int3": torch.arange(-4, 4) / 4,
    "int2": torch.arange(-2, 2) / 2,
    "nf3": torch.tensor([-0.7746, -0.4520, -0.2127, 0.0, 0.1788, 0.3759, 0.6200, 1.0]),
    "nf2": torch.tensor([-0.7578, -0.1651, 0.3495, 1.0]),
}


def levels(kind):
    return LEVELS[kind] if kind in LEVELS else bnb.get_4bit_type(kind, device="cpu")


def codes_of(packed):
    """The codes one by one: 4 bits with the high nibble first, 2 bits in four parts of the values,
    3 bits as 2 lower bits and then 1 upper bit in eight parts.
    """
    held = packed.codes.view(torch.uint8).tolist()
    bits = int(packed.format.quant_type[-1])
    count = 8 * len(held) // bits
    if bits == 4:
        return torch.tensor([code for byte in held for code in (byte >> 4, byte & 15)])
    quarter, eighth = count // 4, count // 8
    codes = [held[i % quarter] >> 2 * (i // quarter) & 3 for i in range(count)]
    if bits == 3:
        upper = held[quarter:]
        codes = [c + 4 * (upper[i % eighth] >> i // eighth & 1) for i, c in enumerate(codes)]
    return torch.tensor(codes)


def look_up(packed):
    """Dequantization in plain torch: level times scale, padding dropped."""
    fmt = packed.format
    shape = packed.shape
    values = levels(fmt.quant_type)[codes_of(packed)]
    scales = packed.scales.view(torch.float32).repeat_interleave(fmt.block_size)
    return (values * scales)[: torch.Size(shape).numel()].view(shape)


def nearest(matrix, kind, block):
    """Quantization in plain torch: every value to the nearest level times the block's absmax."""
    flat = torch.nn.functional.pad(matrix.flatten(), (0, -matrix.numel() % block)).view(-1, block)
    absmax = flat.abs().amax(1, keepdim=True)
    table = levels(kind)
    index = (flat.unsqueeze(2) / absmax.unsqueeze(2) - table).abs().argmin(2)
    return (table[index] * absmax).flatten()[: matrix.numel()].view(matrix.shape)


def relative_error(matrix, approximation):
    return ((matrix.double() - approximation.double()).norm() / matrix.double().norm()).item()


@bnb_types
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("shape", [(128, 64), (64, 256), (3, 1024)], ids=str)
def test_equals_bitsandbytes_where_rows_are_whole_blocks(kind, double, block, shape):
    matrix = gaussian(*shape)
    codes, state = bnb.quantize_4bit(
        matrix, blocksize=block, compress_statistics=double, quant_type=kind
    )
    fmt = QuantFormat(kind, block, double)
    assert torch.equal(quantize(matrix, fmt).codes.view(torch.uint8), codes.flatten())
    if shape[1] % block == 0:
        assert_close(round_trip(matrix, fmt), bnb.dequantize_4bit(codes, state), rtol=0, atol=0)


@bnb_types
@awkward
def test_awkward_shapes_equal_the_nearest_level(kind, shape):
    matrix = gaussian(*shape)
    assert_close(round_trip(matrix, QuantFormat(kind)), nearest(matrix, kind, 64))


@all_types
@pytest.mark.parametrize("block", [64, 2048])
def test_dequantize_equals_a_look_up(kind, block):
    """2048: bitsandbytes takes another path from there on."""
    for shape in AWKWARD:
        packed = quantize(gaussian(*shape), QuantFormat(kind, block))
        assert_close(packed.dequantize(torch.float32), look_up(packed))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_codes_are_packed_in_their_bits_and_come_back(bits):
    codes = torch.randint(1 << bits, (64 * 7,), dtype=torch.uint8)
    held = packing.packed(codes, bits)
    assert held.numel() * 8 == codes.numel() * bits
    assert torch.equal(packing.unpacked(held, bits), codes)


@all_formats
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_gives_every_dtype(fmt, dtype):
    """Half types are the rounded float32 values.

    They may differ by one unit in the last place, as the kernel may round twice.
    """
    matrix = gaussian(37, 41)
    found = round_trip(matrix, fmt, dtype)
    assert found.dtype == dtype
    assert found.shape == matrix.shape
    expected = round_trip(matrix, fmt).to(dtype)
    assert_close(found, expected, rtol=0 if dtype.itemsize > 2 else torch.finfo(dtype).eps, atol=0)


@all_formats
def test_packed_sizes_are_the_sizes_that_quantize_makes(fmt):
    for shape, block in product(AWKWARD, BLOCK_SIZES):
        fmt = QuantFormat(fmt.quant_type, block, fmt.double_quant)
        tensors = quantize(gaussian(*shape), fmt).tensors()
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        assert sizes == fmt.packed_sizes(torch.Size(shape).numel())
        assert all(tensor.dim() == 1 for tensor in tensors.values())


@all_formats
def test_more_than_256_blocks_have_more_than_one_second_level_scale(fmt):
    tensors = quantize(gaussian(300, 64), fmt).tensors()
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    assert sizes == fmt.packed_sizes(300 * 64)


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_per_weight(double, bits):
    """4 bits and a float32 scale for 64 values.

    With double quantization (QLoRA, section 3): 4.127, and one offset for the matrix.
    """
    values = 64 * 256 * 16
    stored = sum(QuantFormat("nf4", 64, double).packed_sizes(values).values())
    assert 8 * stored == bits * values + 32 * double


@all_formats
def test_bytes_survive_a_dtype_conversion_of_the_model(fmt):
    matrix = gaussian(20, 30)
    parameters = {
        name: torch.nn.Parameter(tensor, requires_grad=False)
        for name, tensor in quantize(matrix, fmt).tensors().items()
    }
    module = torch.nn.ParameterDict(parameters).to(torch.bfloat16).half().float()
    again = frozen_weight(fmt, (20, 30), **dict(module.items()))
    assert torch.equal(again.dequantize(torch.float32), round_trip(matrix, fmt))


# Relative root error on Gaussian weights, 256 x 256, block 64, measured over 20 seeds: mean and
# standard deviation, with plain and with searched scales.
@pytest.mark.parametrize(
    ("kind", "double", "plain", "searched"),
    [
        ("nf4", False, (0.09191, 0.00034), (0.08607, 0.00020)),
        ("nf4", True, (0.09194, 0.00034), (0.08621, 0.00021)),
        ("fp4", False, (0.12185, 0.00033), (0.11728, 0.00033)),
        ("fp4", True, (0.12186, 0.00032), (0.11734, 0.00033)),
        ("int4", False, (0.09488, 0.00044), (0.09206, 0.00042)),
        ("int4", True, (0.09513, 0.00043), (0.09215, 0.00043)),
        ("nf3", False, (0.17826, 0.00064), (0.17278, 0.00061)),
        ("nf3", True, (0.17839, 0.00063), (0.17285, 0.00061)),
        ("int3", False, (0.19169, 0.00097), (0.18436, 0.00089)),
        ("int3", True, (0.19181, 0.00097), (0.18440, 0.00089)),
        ("nf2", False, (0.41912, 0.00167), (0.39722, 0.00161)),
        ("nf2", True, (0.41919, 0.00169), (0.39723, 0.00163)),
        ("int2", False, (0.39414, 0.00179), (0.38011, 0.00162)),
        ("int2", True, (0.39420, 0.00180), (0.38014, 0.00162)),
    ],
)
def test_error_on_gaussian_weights(kind, double, plain, searched):
    matrix = gaussian(256, 256, seed=100)
    fmt = QuantFormat(kind, 64, double)
    for rounding, (mean, sigma) in ((Rounding(), plain), (SEARCHED, searched)):
        error = relative_error(matrix, round_trip(matrix, fmt, rounding=rounding))
        assert error == pytest.approx(mean, abs=5 * sigma)


def test_int4_beats_scaling_by_the_largest_magnitude():
    """The largest magnitude gives 0.108 with 15 levels; the lowest of 16 levels takes it here."""
    matrix = gaussian(128, 256)
    steps = matrix.view(-1, 64).abs().amax(1, keepdim=True) / 7
    plain = (matrix.view(-1, 64) / steps).round() * steps
    error = relative_error(matrix, round_trip(matrix, QuantFormat("int4")))
    assert error <= 0.097 < relative_error(matrix.view(-1, 64), plain)


@all_formats
def test_searched_scales_have_the_nearest_levels(fmt):
    """No other level is nearer, for the scales as stored (in 8 bits with double quantization)."""
    matrix = gaussian(16, 64)
    packed = quantize(matrix, fmt, SEARCHED)
    grid = levels(fmt.quant_type) * packed.block_scales().view(-1, 1)
    best = (matrix.unsqueeze(2) - grid.unsqueeze(1)).abs().amin(2)
    assert_close((matrix - packed.dequantize(torch.float32)).abs(), best)


def spread_of(blocks, weights):
    if weights is not None:
        return weights
    return 1 + 3 * (blocks.abs() == blocks.abs().amax(1, keepdim=True))


def candidate_errors(blocks, kind, weights):
    """Weighted squared errors of all candidates, (candidates, blocks), by a loop in float64.

    Without weights the largest entry of a block counts four times.
    """
    table = levels(kind).double()
    clips = (
        (1.0, 0.9, 0.8, 0.7, 0.6, 0.5) if len(table) == 4 else (1.0, 0.94, 0.88, 0.82, 0.76, 0.7)
    )
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).double()
    errors = []
    for outermost in {table.min().item(), table.max().item()}:
        for clip in (1.0, 0.97, 0.94) if weights is None else clips:
            scale = peak / outermost * clip
            gaps = (blocks.double().unsqueeze(2) - (table * scale.unsqueeze(2))).abs().amin(2)
            errors.append((gaps.square() * spread_of(blocks, weights)).sum(1))
    return torch.stack(errors)


@all_types
@pytest.mark.parametrize("weighted", [False, True])
def test_a_searched_scale_has_the_smallest_error_of_all_candidates(kind, weighted):
    matrix = gaussian(32, 64)
    weights = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    weights = weights.square() if weighted else None
    found = round_trip(matrix, QuantFormat(kind), rounding=Rounding(True, weights))
    errors = ((matrix - found).double().square() * spread_of(matrix, weights)).sum(1)
    assert_close(errors, candidate_errors(matrix, kind, weights).amin(0), rtol=1e-5, atol=0)


@all_types
def test_column_weights_follow_blocks_that_span_rows(kind):
    """40 columns in blocks of 64: a block has the ends and the starts of rows."""
    matrix = gaussian(24, 40)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1)) ** 4 + 0.01
    found = round_trip(matrix, QuantFormat(kind), rounding=Rounding(True, weights))
    blocks = matrix.view(-1, 64)
    spread = weights.repeat(24).view(-1, 64)
    errors = ((blocks - found.view(-1, 64)).double().square() * spread).sum(1)
    assert_close(errors, candidate_errors(blocks, kind, spread).amin(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "int4", "nf3", "nf2"])
@pytest.mark.parametrize("double", [False, True])
def test_negative_scales_go_through_the_kernels_of_bitsandbytes(kind, double):
    """The levels are not symmetric, so about half of the searched scales are negative."""
    matrix = gaussian(32, 128)
    packed = quantize(matrix, QuantFormat(kind, 64, double), SEARCHED)
    scales = packed.block_scales()
    assert 0.2 < (scales < 0).double().mean() < 0.8
    values = levels(kind)[codes_of(packed)]
    dense = (values.view(-1, 64) * scales.unsqueeze(1)).view(32, 128)
    assert_close(packed.dequantize(torch.float32), dense)
    x = gaussian(5, 128, seed=1)
    assert_close(packed.matmul(x), x @ dense.T)
    if kind == "nf4":
        state = packed.bnb_state(torch.float32)
        kernel = bnb.dequantize_4bit(packed.codes.view(torch.uint8).view(-1, 1), state)
        assert_close(kernel, dense)


def test_int4_keeps_a_lone_outlier_and_a_constant_block_exactly():
    matrix = torch.zeros(3, 64)
    matrix[0, 5] = 1000.0
    matrix[1] = 0.5
    matrix[2, 7] = -0.01
    assert_close(round_trip(matrix, QuantFormat("int4")), matrix, rtol=1e-6, atol=0)


@all_types
def test_all_zero_blocks_stay_zero_and_harm_no_other(kind):
    matrix = gaussian(4, 64)
    expected = round_trip(matrix, QuantFormat(kind))
    matrix[2] = 0
    expected[2] = 0
    if (
        kind == "int4"
    ):  # level 0 is code 8; a scale of 0 must not end in a NaN that is cast to an integer
        assert (
            quantize(matrix, QuantFormat(kind)).codes.view(torch.uint8).view(4, 32)[2] == 0x88
        ).all()
    assert_close(round_trip(matrix, QuantFormat(kind)), expected, rtol=0, atol=0)


@all_formats
def test_zero_matrix_stays_zero(fmt):
    assert not round_trip(torch.zeros(5, 64), fmt).any()


@all_types
def test_an_outlier_is_kept_and_harms_only_its_block(kind):
    matrix = gaussian(4, 64)
    expected = round_trip(matrix, QuantFormat(kind))
    matrix[1, 5] = 1000.0
    found = round_trip(matrix, QuantFormat(kind))
    assert found[1, 5].item() == pytest.approx(1000)
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


@bnb_types
@awkward
def test_quantizing_a_dequantized_matrix_changes_nothing(kind, shape):
    once = round_trip(gaussian(*shape), QuantFormat(kind))
    assert_close(round_trip(once, QuantFormat(kind)), once, rtol=0, atol=0)


@all_types
def test_scaling_by_a_power_of_two_scales_the_result(kind):
    matrix = gaussian(10, 30)
    assert torch.equal(
        round_trip(matrix * 0.25, QuantFormat(kind)), round_trip(matrix, QuantFormat(kind)) * 0.25
    )


@all_formats
def test_layout_and_dtype_of_the_matrix_do_not_matter(fmt):
    """A Conv1D weight is read as a transposed view; models come in bf16."""
    matrix = gaussian(48, 36).bfloat16()
    expected = quantize(matrix.float().T.contiguous(), fmt)
    found = quantize(matrix.T, fmt).tensors()
    assert_close(found, expected.tensors(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_type": "nf5"}, "quant_type is 'nf5'; it must be one of nf4, fp4, int4"),
        ({"block_size": 16}, "block_size is 16; it must be one of 32, 64, 128"),
        ({"block_size": 100}, "block_size is 100"),
    ],
)
def test_formats_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantFormat(**settings)


@pytest.mark.parametrize("block_size", [64, 4096])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_rounded_is_quantized_and_back_to_the_bit(quant_type, double_quant, block_size):
    fmt = QuantFormat(quant_type, block_size, double_quant)
    generator = torch.Generator().manual_seed(0)
    for shape in ((1,), (63,), (7, 64), (33, 129), (300, 1000)):
        matrix = torch.randn(shape, generator=generator) * torch.rand(
            shape, generator=generator
        ).pow(4)
        assert torch.equal(rounded(matrix, fmt), quantize(matrix, fmt).dequantize(torch.float32))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rounded_agrees_at_the_boundaries_between_levels(quant_type):
    """Midpoints of levels, their neighbouring floats, edges of cells; extreme scales too."""
    fmt = QuantFormat(quant_type)
    levels = bnb.get_4bit_type(quant_type, device="cpu").float().sort().values
    middles = (levels[1:] + levels[:-1]) / 2
    away = [torch.nextafter(middles, torch.tensor(side)) for side in (-2.0, 2.0)]
    values = torch.cat(
        [middles, *away, levels, torch.linspace(-1, 1, 1025), torch.tensor([1e-38, -1e-45, 0.0])]
    )
    values = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    matrix = torch.cat(
        [torch.ones(len(values), 1), values], dim=1
    )  # the largest entry of every block is 1
    for scale in (1.0, 1e30, 1e-30, 0.0):
        scaled = matrix * scale
        back = quantize(scaled, fmt).dequantize(torch.float32)
        assert torch.equal(rounded(scaled, fmt), back)


@all_formats
@pytest.mark.parametrize("tokens", [1, 3])
def test_matmul_multiplies_by_the_dequantized_matrix(fmt, tokens):
    """bitsandbytes' CPU kernel is wrong for rows that are not whole blocks, such as 32 and 96."""
    for width in (32, 40, 64, 96, 128):
        packed = quantize(gaussian(8, width, seed=8), fmt)
        x = gaussian(tokens, width, seed=tokens)
        assert_close(packed.matmul(x), x @ packed.dequantize(torch.float32).T)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [40, 64, 96])
@pytest.mark.parametrize(
    "fmt", [QuantFormat(), QuantFormat("int4", 32), QuantFormat(double_quant=True)], ids=repr
)
def test_matmul_of_a_large_matrix_goes_a_few_rows_at_a_time(fmt, width, biased, monkeypatch):
    packed = quantize(gaussian(45, width, seed=8), fmt)
    x = gaussian(3, width, seed=3)
    bias = gaussian(45, seed=4) if biased else None
    expected = packed.matmul(x, bias)
    monkeypatch.setattr(quantized, "_FRESH_BYTES", 4000)
    monkeypatch.setattr(quantized, "_TILE_BYTES", 2000)
    sizes = []
    monkeypatch.setattr(
        quantized, "linear", lambda x, w, b: sizes.append(w.shape) or linear(x, w, b)
    )
    assert_close(packed.matmul(x, bias), expected)
    whole_blocks = fmt.block_size // math.gcd(fmt.block_size, width)
    assert sizes[0][0] == max(500 // (width * whole_blocks), 1) * whole_blocks
    assert sum(rows for rows, _ in sizes) == 45
