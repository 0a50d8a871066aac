"""The same code on a GPU: equal to the CPU up to rounding. Skipped without a GPU."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainingArguments

import qrefta
from qrefta._compat.transformers import enable_checkpointing
from qrefta.choices import METHOD_NAMES, QUANT_TYPES
from qrefta.config.settings import Settings
from qrefta.linalg.metric import output_error
from qrefta.linalg.tsvd import t_svd, t_svd_exact
from qrefta.model.stacks import find_stacks
from qrefta.nn.quantize import Rounding, quantize
from qrefta.nn.quantized import QuantFormat
from qrefta.split.calibrate import gather_moments
from qrefta.split.rounding import StackRounding
from qrefta.train.nan_guard import FiniteSteps, _all_finite
from tests.models import ARCHITECTURES, inputs, language_tokenizer, logits, tiny_llama
from tests.nn.test_product import operands, packed_weight, product
from tests.split.test_rounding import matrix_of, moments_of, stack_of
from tests.stacks import slices_of, transform_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_matrix_packed_on_the_cpu_reads_the_same_on_the_gpu(
    quant_type, block_size, double_quant, dtype
):
    """In 4, 3 and 2 bits; the last block is padded."""
    fmt = QuantFormat(quant_type, block_size, double_quant)
    matrix = torch.randn(100, 95, generator=torch.Generator().manual_seed(0))
    packed = quantize(matrix, fmt)
    on_gpu = packed.to("cuda", torch.float32)
    assert {tensor.device.type for tensor in on_gpu.tensors().values()} == {"cuda"}
    assert_close(on_gpu.dequantize(dtype).cpu(), packed.dequantize(dtype))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_matrix_packed_on_the_gpu_reads_the_same_on_the_cpu(quant_type, double_quant):
    fmt = QuantFormat(quant_type, 64, double_quant)
    matrix = torch.randn(100, 95, generator=torch.Generator().manual_seed(0))
    packed = quantize(matrix.cuda(), fmt)
    expected = packed.dequantize(torch.float32).cpu()
    assert_close(packed.to("cpu", torch.float32).dequantize(torch.float32), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_error_feedback_rounds_on_the_gpu_as_on_the_cpu(quant_type, double_quant):
    """A target near the middle of two levels may go the other way, and later columns with it."""
    fmt = QuantFormat(quant_type, 64, double_quant)
    stack = stack_of(128, 256)
    moments = moments_of(stack)
    matrix = matrix_of(128, 256)
    errors = []
    for device in ("cpu", "cuda"):
        rounding = StackRounding(Settings(), stack, moments, torch.device(device)).stored(0)
        packed = quantize(matrix.to(device), fmt, rounding)
        assert packed.codes.device.type == device
        error = matrix - packed.dequantize(torch.float32).cpu()
        errors.append(output_error(error, moments.of(stack.modules[0])))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_negative_scales_go_through_the_matmul_of_bitsandbytes(tokens):
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for double_quant in (False, True):
        fmt = QuantFormat("nf4", 64, double_quant)
        packed = quantize(matrix, fmt, Rounding(search=True)).to("cuda", torch.float32)
        assert (packed.block_scales() < 0).any()
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(1)).cuda()
        expected = x @ packed.dequantize(torch.float32).T
        assert_close(packed.matmul(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prepared_model_computes_the_same_on_both_devices(architecture):
    model = qrefta.prepare(ARCHITECTURES[architecture](), rank=5)
    expected = logits(model)
    assert_close(logits(model.cuda()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_preparing_on_the_gpu_removes_the_same_error(architecture):
    """Singular vectors may differ where values are close; the removed energy may not."""
    on_cpu = qrefta.prepare(ARCHITECTURES[architecture](), rank=5, method="refta")
    on_gpu = qrefta.prepare(ARCHITECTURES[architecture]().cuda(), rank=5, method="refta")
    for ours, theirs in zip(qrefta.quant_report(on_gpu), qrefta.quant_report(on_cpu), strict=True):
        assert ours["ratio"] == pytest.approx(theirs["ratio"], abs=0.02)
        assert ours["principal_energy"] == pytest.approx(theirs["principal_energy"], rel=1e-3)


@pytest.mark.parametrize("method", ["windows", "refta"])
@pytest.mark.parametrize(
    "options",
    [{}, {"quant_type": "int4"}, {"bits": 3}, {"bits": 2}, {"moments": True}],
    ids=str,
)
def test_a_stack_at_a_time_goes_to_the_gpu_and_comes_back(options, method):
    """Same seed and device: same bits. The model stays on the CPU; the error equals the CPU's."""
    model = ARCHITECTURES["llama_gqa"]
    options = options | {"method": method}
    if "moments" in options:
        dense = model()
        options["moments"] = gather_moments(dense, find_stacks(dense), [inputs(dense)])
    first, second = (qrefta.prepare(model(), rank=5, device="cuda", **options) for _ in range(2))
    assert {tensor.device.type for tensor in first.state_dict().values()} == {"cpu"}
    for (name, ours), theirs in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    on_cpu = qrefta.prepare(model(), rank=5, **options)
    for ours, theirs in zip(qrefta.quant_report(first), qrefta.quant_report(on_cpu), strict=True):
        assert ours["ratio"] == pytest.approx(theirs["ratio"], abs=0.02)


def test_large_slices_are_decomposed_on_the_gpu():
    """The block method proper: the energy of the exact SVD, and the same bits again."""
    stack = torch.randn(4, 512, 384, generator=torch.Generator().manual_seed(0)).cuda()
    slices = slices_of(stack, transform_of(stack, "lsm3"))
    (found, _), (again, _) = (t_svd(slices, 20, seed=0) for _ in range(2))
    exact = t_svd_exact(slices, 20)
    assert found.values.square().sum() >= 0.999 * exact.values.square().sum()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, again, strict=True))


def test_moments_gathered_on_the_gpu_equal_the_cpus():
    found = []
    for place in ("cpu", "cuda"):
        model = ARCHITECTURES["llama_gqa"]().to(place)
        batch = {name: tensor.to(place) for name, tensor in inputs(model).items()}
        found.append(gather_moments(model, find_stacks(model), [batch]))
    on_cpu, on_gpu = found
    for path in on_cpu.owners:
        assert on_gpu.of(path).device.type == "cpu"
        assert_close(on_gpu.of(path), on_cpu.of(path), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["windows", "refta"])
def test_preparing_with_a_gpu_holds_a_stack_there_and_not_the_model(method):
    model = ARCHITECTURES["bert"]()
    largest = max(
        4 * module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    layers = model.config.num_hidden_layers
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    qrefta.prepare(model, rank=5, method=method, device="cuda")
    assert torch.cuda.max_memory_allocated() - before <= 12 * layers * largest + (
        32 << 20
    )  # cuBLAS has a workspace
    assert torch.cuda.memory_allocated() - before < layers * largest


@pytest.mark.parametrize("architecture", ["bert", "t5", "gpt2"])
def test_gradients_equal_the_cpus(architecture):
    on_cpu = qrefta.prepare(ARCHITECTURES[architecture](), rank=5, method="refta")
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for model in (on_cpu, on_gpu):
        batch = {name: tensor.to(model.device) for name, tensor in inputs(model).items()}
        model(**batch).logits.square().sum().backward()
    for (name, ours), theirs in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        if ours.requires_grad and theirs.grad is not None:
            assert_close(
                ours.grad.cpu(),
                theirs.grad,
                rtol=1e-2,
                atol=1e-3,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def train(model, steps=3):
    """Losses of AdamW steps, and the changes of the trainable parameters, on the CPU."""
    batch = {name: tensor.to(model.device) for name, tensor in inputs(model).items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [(now.detach() - then).cpu() for now, then in zip(trained, before, strict=True)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("method", ["windows", "refta"])
def test_training_steps_equal_the_cpus(method, bits, checkpointing):
    """AdamW's first steps have the sign of the gradient, which rounding may turn where it is small.

    Between float32 and float64 on a CPU the changes differ by up to 0.0002 of their norm.
    """
    on_cpu = qrefta.prepare(tiny_llama(hidden=64), bits=bits, method=method, rank=8).train()
    moved(on_cpu)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    if checkpointing:
        enable_checkpointing(on_gpu)
    expected, expected_changes = train(on_cpu)
    losses, changes = train(on_gpu)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < losses[0]
    for ours, theirs in zip(changes, expected_changes, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_step_under_autocast_is_near_the_float32_step(method, dtype):
    model = qrefta.prepare(tiny_llama(hidden=64), method=method, rank=4).cuda().train()
    moved(model)
    batch = {name: tensor.cuda() for name, tensor in inputs(model).items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for enabled in (False, True):
        with torch.autocast("cuda", dtype, enabled=enabled):
            loss = model(**batch, labels=batch["input_ids"]).loss
        gradients = torch.autograd.grad(loss, trained)
        found.append((loss.item(), torch.cat([one.flatten() for one in gradients])))
    (expected, exact), (loss, gradient) = found
    assert gradient.dtype == torch.float32
    assert loss == pytest.approx(expected, rel=0.02)
    assert (gradient - exact).norm() <= 0.1 * exact.norm()


def test_trainer_takes_steps_on_the_gpu(tmp_path):
    """In bf16, with the check for finite losses and gradients."""
    if torch.cuda.device_count() > 1:
        pytest.skip("Trainer would choose DataParallel")
    model = qrefta.prepare(tiny_llama(hidden=64), rank=8)
    batch = inputs(model)["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in batch] * 4
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        bf16=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    result = FiniteSteps(model, arguments, train_dataset=rows).train()
    assert result.global_step == 4
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter.detach().cpu(), before[name])
        assert changed == parameter.requires_grad, name


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_generation_equals_the_cpus_and_training_goes_on(rows, bits):
    """One row uses the kernel for one token; a step after it sees the trained factors."""
    on_cpu = qrefta.prepare(tiny_llama(hidden=64), bits=bits, rank=8).eval()
    moved(on_cpu)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    prompt = inputs(on_cpu)["input_ids"][:rows]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = on_cpu.generate(prompt, **options)
    found = on_gpu.generate(prompt.cuda(), **options)
    assert torch.equal(found.cpu(), expected)
    losses, _ = train(on_gpu.train(), steps=5)
    assert losses[-1] < losses[0]
    assert not torch.equal(logits(on_gpu.eval()), logits(on_cpu))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_merging_on_the_gpu_keeps_the_logits(method, tmp_path):
    """In place, and as a folder that the CPU reads."""
    model = qrefta.prepare(tiny_llama(hidden=64), method=method, rank=4).cuda()
    moved(model)
    expected = logits(model)
    export = qrefta.merge(model, torch.float32, out=tmp_path / "merged")
    assert export.difference < 1e-3
    merged = qrefta.merge(model, torch.float32)
    assert {parameter.device.type for parameter in merged.parameters()} == {"cuda"}
    assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_loading_on_the_gpu_keeps_the_logits(method, bits, tmp_path):
    model = qrefta.prepare(tiny_llama(hidden=64), method=method, bits=bits, rank=4)
    moved(model)
    model.save_pretrained(tmp_path)
    loaded = qrefta.load(tmp_path, device_map="cuda")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    assert {buffer.device.type for buffer in loaded.buffers()} == {"cuda"}
    assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad


def test_saving_from_the_gpu_and_loading_on_the_cpu_keeps_the_bits(tmp_path):
    model = qrefta.prepare(ARCHITECTURES["llama_gqa"]().cuda(), rank=5)
    model.save_pretrained(tmp_path)
    loaded = qrefta.load(tmp_path)
    for (name, ours), theirs in zip(
        loaded.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs.cpu().to(ours.dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 30, 56, 90])
@pytest.mark.parametrize(
    "fmt",
    [None, QuantFormat(), QuantFormat("fp4"), QuantFormat("int4"), QuantFormat("nf3")],
    ids=repr,
)
def test_an_adapted_product_is_the_same_on_both_devices(fmt, tokens, dtype):
    """Few tokens use bitsandbytes' fused kernel, many tokens either form of adding the update."""
    packed = packed_weight(fmt)
    grad = torch.ones(tokens, 48, dtype=dtype)
    found = []
    for device in ("cpu", "cuda"):
        made = [tensor.to(device, dtype).requires_grad_() for tensor in operands(tokens)]
        y = product(made, packed.to(device, torch.float32))
        found.append([y, *torch.autograd.grad(y, made, grad.to(device))])
    limit = 1e-3 if dtype == torch.float32 else 0.02  # TF32 may be on
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert (on_gpu.cpu() - on_cpu).float().norm() <= limit * on_cpu.float().norm()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_prepares_and_computes_the_same_on_both_devices(method):
    """Error of the split on the GPU; logits and gradients of one prepared model moved there."""
    options = {"method": method, "rank": 4, "progress": False}
    on_cpu, on_gpu = (
        qrefta.prepare(ARCHITECTURES["llama_gqa"](), **options, device=place)
        for place in (None, "cuda")
    )
    for ours, theirs in zip(qrefta.quant_report(on_gpu), qrefta.quant_report(on_cpu), strict=True):
        assert ours["ratio"] == pytest.approx(theirs["ratio"], abs=0.02)
    moved(on_cpu)
    found = []
    for model in (on_cpu, copy.deepcopy(on_cpu).cuda()):
        batch = {name: tensor.to(model.device) for name, tensor in inputs(model).items()}
        loss = model(**batch, labels=batch["input_ids"]).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, trained)])
    for expected, ours in zip(*found, strict=True):
        assert (ours.cpu() - expected).norm() <= 1e-3 * expected.norm()


def moved(model):
    """Factors after some training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(1)
                )


def test_gradients_on_two_devices_are_judged_together():
    good = torch.ones(3)
    assert _all_finite([good.cuda(), good])
    assert not _all_finite([good.cuda(), good * torch.inf])


def split_map(first, second):
    """A device map of the tiny Llama without an entry for the factors."""
    return {
        "model.embed_tokens": first,
        "model.layers.0": first,
        "model.layers.1": second,
        "model.layers.2": second,
        "model.norm": second,
        "model.rotary_emb": second,
        "lm_head": second,
    }


@pytest.mark.parametrize("second", [1, "cpu"])
def test_a_model_over_two_devices_computes_and_trains_the_same(second, tmp_path):
    """Two GPUs, or a GPU and layers that accelerate brings over from CPU memory when they run."""
    if second == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    whole = qrefta.prepare(ARCHITECTURES["llama_gqa"](), rank=5)
    whole.save_pretrained(tmp_path)
    parts = qrefta.load(tmp_path, device_map=split_map(0, second))
    batch = inputs(whole)
    on_gpu = {name: part.cuda() for name, part in batch.items()}
    found = parts(**on_gpu).logits.cpu()
    assert_close(found, whole(**batch).logits, rtol=1e-3, atol=1e-3)
    found = []
    for model in (whole, parts):
        ids = batch["input_ids"].to(model.get_input_embeddings().weight.device)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(
            [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
        )
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_models_on_two_devices_compare_as_on_one(tmp_path):
    """The distance to a reference does not depend on the device of either."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{30 + 7 * index % 60}" for index in range(100)))
    reference = ARCHITECTURES["llama_gqa"]()
    model = qrefta.prepare(ARCHITECTURES["llama_gqa"](), rank=5)
    options = {"tokenizer": language_tokenizer(), "window": 16, "progress": False}
    (expected,) = qrefta.compare(model, reference, text, **options)
    pairs = [
        (copy.deepcopy(model).cuda(), reference),
        (model, copy.deepcopy(reference).cuda()),
    ]
    for one, other in pairs:
        (found,) = qrefta.compare(one, other, text, **options)
        assert found.kl_mean == pytest.approx(expected.kl_mean, rel=1e-2)
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-2)
