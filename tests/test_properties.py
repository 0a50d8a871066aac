"""Properties that hold for every shape, rank, format and scale, on examples that hypothesis
chooses.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import qrefta
from qrefta.choices import QUANT_TYPES, bits_of
from qrefta.config.settings import Settings
from qrefta.linalg.tsvd import squared_norm
from qrefta.methods import METHODS
from qrefta.model.weights import LARGEST_WEIGHT, check_values
from qrefta.nn.quantize import quantize
from qrefta.nn.quantized import QuantFormat
from qrefta.train.arguments import training_arguments
from qrefta.train.finetune import finetune
from qrefta.train.models import load_classifier
from tests.models import build, inputs, logits
from tests.stacks import split_and_error
from tests.tiny import color_data, tiny_folder, tiny_tokenizer

some = settings(max_examples=60, deadline=None, derandomize=True)
few = settings(max_examples=6, deadline=None, derandomize=True)
formats = st.builds(
    QuantFormat,
    st.sampled_from(QUANT_TYPES),
    st.sampled_from([64, 128, 256]),
    st.booleans(),
)
sizes = st.integers(1, 70)
scales = st.sampled_from([1e-40, 1e-30, 1e-6, 0.02, 1.0, 1e4, 1e11])
kinds = st.sampled_from(["random", "rank one", "equal", "zero", "outlier", "rows of all scales"])
HALF_GAP = {
    "nf4": 0.153,
    "fp4": 0.168,
    "int4": 0.5,
    "nf3": 0.2256,
    "int3": 0.2501,
    "nf2": 0.3254,
    "int2": 0.5001,
}  # of the widest, over the block's largest number; formats without -1 or 1 clip


def weights(kind, shape, scale, seed):
    """A stack (layers, out, in)."""
    g = torch.Generator().manual_seed(seed)
    stack = torch.randn(*shape, generator=g) * scale
    if kind == "rank one":
        stack = (
            torch.randn(shape[0], 1, 1, generator=g)
            * stack[:1, :, :1]
            * torch.randn(1, 1, shape[2], generator=g)
        )
    if kind in ("equal", "zero"):
        stack = torch.full(shape, scale if kind == "equal" else 0.0)
    if kind == "outlier":
        stack[0, 0, 0] = min(1e4 * scale, LARGEST_WEIGHT)
    if kind == "rows of all scales":
        stack *= torch.logspace(-20, 0, shape[1])[None, :, None]
    return stack


def defined_error(stack, split, fmt):
    """sum_l ||W_l - dequant(Q_l) - Delta_l||_F^2, in float64."""
    total = 0.0
    for layer, (weight, packed) in enumerate(zip(stack, split.residuals, strict=True)):
        kept = packed.dequantize(torch.float32).double()
        if split.factors is not None:
            kept += split.factors.delta(layer).double()
        total += np.square(weight.double().numpy() - kept.numpy()).sum()
    return total


@some
@given(sizes, sizes, kinds, scales, formats, st.integers(0, 9))
@example(1, 1, "random", 1e-30, QuantFormat("nf4", 64, False), 0)
@example(7, 13, "outlier", 1.0, QuantFormat("nf4", 64, True), 0)
def test_a_number_is_off_by_half_the_widest_gap_of_its_block_at_most(
    rows, columns, kind, scale, fmt, seed
):
    matrix = weights(kind, (1, rows, columns), scale, seed)[0]
    packed = quantize(matrix, fmt)
    found = packed.dequantize(torch.float32)
    assert found.isfinite().all()
    sizes = {name: tensor.nbytes for name, tensor in packed.tensors().items()}
    assert sizes == fmt.packed_sizes(matrix.numel())
    flat = matrix.flatten()
    error = (found - matrix).flatten().abs()
    for start in range(0, len(flat), fmt.block_size):
        largest = flat[start : start + fmt.block_size].abs().max().item()
        allowed = HALF_GAP[fmt.quant_type] * largest
        if fmt.double_quant:  # 256 scales share a grid
            allowed += 0.02 * flat.abs().max().item()
        if largest > 1e-36:  # below, scales are no longer exact
            assert error[start : start + fmt.block_size].max() <= allowed


@some
@given(
    st.integers(1, 5),
    sizes,
    sizes,
    kinds,
    scales,
    formats,
    st.integers(0, 40),
    st.sampled_from([0, 2]),
    st.sampled_from(["lsm3", "dct", "identity"]),
    st.sampled_from([4, 16]),
    st.sampled_from([*METHODS, "refta"]),
)
@example(3, 16, 24, "random", 1e-30, QuantFormat("nf4", 64, False), 6, 2, "lsm3", 4, "refta")
@example(2, 8, 8, "zero", 1.0, QuantFormat("int4", 64, False), 3, 2, "lsm3", 4, "refta")
@example(1, 5, 7, "equal", 0.02, QuantFormat("nf4", 64, False), 2, 2, "dct", 4, "craft")
def test_a_stack_is_its_stored_tensors_plus_the_stated_error(
    layers, rows, columns, kind, scale, fmt, rank, refine, transform, bits, method
):
    """For all weights, stored tensors are finite and the error follows its definition."""
    shape = (layers, rows, columns)
    rank = min(rank, METHODS[method].largest_rank(layers, rows, columns))
    if method == "craft" and rank:
        rank = tuple(min(rank, size) for size in shape)
    if method != "refta" and not rank:
        method = "refta"
    config = Settings(
        bits=16 if bits == 16 else fmt.bits,
        rank=1,
        method=method,
        refine=refine,
        quant_type=fmt.quant_type,
        block_size=fmt.block_size,
        double_quant=fmt.double_quant,
        **({"transform": transform} if method == "refta" else {}),
    )
    stack = weights(kind, shape, scale, seed=rank if isinstance(rank, int) else sum(rank))
    split = split_and_error(stack, config, rank)
    norm = squared_norm(stack.flatten(0, 1))
    error = defined_error(stack, split, QuantFormat.of(config))
    assert math.isfinite(split.error)
    if QuantFormat.of(config) is None:
        assert error <= 1e-9 * norm
    else:
        assert split.error == pytest.approx(error, rel=1e-3, abs=1e-9 * norm)
    if split.factors is not None:
        assert all(p.isfinite().all() for p in split.factors.parameters() if p.is_floating_point())


@some
@given(sizes, sizes, scales, st.integers(0, 9))
def test_a_squared_norm_is_right_at_every_scale(rows, columns, scale, seed):
    matrix = weights("random", (1, rows, columns), scale, seed)[0]
    expected = np.square(matrix.double().numpy()).sum()
    assert squared_norm(matrix) == pytest.approx(expected, rel=1e-5, abs=0)
    assert squared_norm(matrix * 1e25) == pytest.approx(
        np.square((matrix * 1e25).double().numpy()).sum(), rel=1e-5
    )


@some
@given(st.floats(width=32), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@example(math.nan, torch.float16)
@example(-math.inf, torch.bfloat16)
@example(1.1e12, torch.float32)
def test_weights_that_cannot_be_split_are_refused_and_others_not(value, dtype):
    weight = torch.zeros(3, 4).to(dtype)
    weight[1, 2] = value
    if abs(weight[1, 2].item()) <= LARGEST_WEIGHT:
        check_values("w", weight)
    else:
        with pytest.raises(ValueError, match=r"w holds (NaN|numbers up to)"):
            check_values("w", weight)


def test_numbers_whose_products_overflow_are_refused():
    check_values("w", torch.full((2, 2), 9e11))
    with pytest.raises(
        ValueError, match=r"w holds numbers up to 2e\+12; prepare takes up to 1e\+12"
    ):
        check_values("w", torch.full((2, 2), -2e12))


@few
@given(
    st.sampled_from([1, 2, 3, 5]),
    st.integers(1, 3),
    st.sampled_from([2, 3, 7, 11]),
    st.sampled_from([None, *QUANT_TYPES]),
    st.integers(1, 8),
)
def test_prepare_save_load_and_merge_agree(
    tmp_path_factory, layers, heads, width, quant_type, rank
):
    """Odd and prime widths: loading is exact, merging exact up to rounding."""
    rank = min(rank, 2 * width * layers)
    bits = 16 if quant_type is None else bits_of(quant_type)
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        hidden_size=2 * heads * width,
        head_dim=2 * width,
        intermediate_size=2 * width + 1,
        vocab_size=96,
    )
    dense = build(LlamaForCausalLM, config)
    expected = logits(dense)
    scale = logits(dense).abs().max()
    model = qrefta.prepare(
        dense, method="refta", bits=bits, rank=rank, quant_type=quant_type, refine=1, progress=False
    )
    found = logits(model)
    if bits == 16:
        assert (found - expected).abs().max() <= 1e-5 * scale
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    assert torch.equal(logits(qrefta.load(folder)), found)
    for row in qrefta.quant_report(model):
        assert 0 <= row["residual_error"] <= 1.001 * row["baseline_error"]
    assert (logits(qrefta.merge(model, dtype=torch.float32)) - found).abs().max() <= 1e-4 * scale
    assert inputs(dense).keys() == {"input_ids", "attention_mask"}


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 3]),
    st.sampled_from([3, 7]),
    st.integers(1, 8),
    st.sampled_from(["nf4", "int4"]),
)
def test_a_plan_grows_and_an_export_says_how_near_it_is(
    tmp_path_factory, layers, width, rank, quant_type
):
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=4 * width,
        head_dim=2 * width,
        intermediate_size=2 * width + 1,
        vocab_size=96,
        architectures=["LlamaForCausalLM"],
    )
    asked = {"seq": 8, "rank": rank, "quant_type": quant_type}
    assert (
        qrefta.plan(config, **asked).total_bytes < qrefta.plan(config, batch=2, **asked).total_bytes
    )
    model = qrefta.prepare(
        build(LlamaForCausalLM, config), rank=rank, quant_type=quant_type, refine=0, progress=False
    )
    exported = qrefta.export_lora(
        model, tmp_path_factory.mktemp("export") / "lora", dtype=torch.float32
    )
    assert exported.difference <= 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A classifier on disk."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.sampled_from([*METHODS, "refta"]),
    st.sampled_from([4, 16]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from(["adamw_torch", "sgd", "adamw_8bit"]),
    st.integers(0, 9),
)
@example("refta", 4, 40, 3, 2, True, "adamw_torch", 0)  # a batch larger than the data
def test_a_run_moves_only_trainable_parameters_and_writes_the_stated_model(
    tiny,
    tmp_path_factory,
    method,
    bits,
    batch_size,
    steps,
    accumulation,
    checkpointing,
    optimizer,
    seed,
):
    """For all settings: frozen bits stay, and the folder holds the model in memory."""
    ranks = {"rank": (2, 3, 3)} if method == "craft" else {"rank": 3}
    model = load_classifier(str(tiny), ["red", "blue"], seed=0)
    model = qrefta.prepare(
        model, bits=bits, method=method, refine=0, seed=seed, progress=False, **ranks
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    out = tmp_path_factory.mktemp("run")
    data = color_data(train=24, test=10)
    tokenizer = tiny_tokenizer()
    args = training_arguments(
        "classify",
        out,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        optim=optimizer,
        learning_rate=0.01,
        warmup_steps=0,
        seed=seed,
        disable_tqdm=True,
    )
    result = finetune(model, tokenizer, data, args=args)
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved <= trained
    assert any("classifier" in name for name in moved)
    assert result.steps == steps
    assert result.trained_parameters == sum(before[name].numel() for name in trained)
    assert math.isfinite(result.train_loss)
    batch = tokenizer(list(data["test"]["text"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = qrefta.load(out).eval()(**batch).logits
        assert torch.equal(found, model.eval()(**batch).logits)
    labels = torch.tensor(list(data["test"]["label"]))
    assert result.test_loss == pytest.approx(cross_entropy(found, labels).item(), rel=1e-4)
    assert result.accuracy_after == pytest.approx((found.argmax(1) == labels).float().mean().item())


def test_the_same_seed_gives_the_same_bits():
    def state():
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=96,
        )
        return qrefta.prepare(
            build(LlamaForCausalLM, config), rank=4, progress=False, seed=3
        ).state_dict()

    for (name, first), second in zip(state().items(), state().values(), strict=True):
        assert_close(first, second, rtol=0, atol=0, msg=name)
