"""The same code on a GPU: equal to the CPU up to rounding. Skipped where there is none."""

import copy

import pytest
import torch
from torch.testing import assert_close

import qrefta
from qrefta.quantize import QuantFormat, dequantize, quantize
from qrefta.tensor import t_svd, t_svd_exact
from tests.models import ARCHITECTURES, inputs, logits
from tests.stacks import slices_of, transform_of

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_a_matrix_packed_on_the_cpu_reads_the_same_on_the_gpu(quant_type, double_quant):
    fmt = QuantFormat(quant_type, 64, double_quant)
    matrix = torch.randn(100, 96, generator=torch.Generator().manual_seed(0))
    packed = quantize(matrix, fmt)
    on_gpu = type(packed)(*(None if part is None else part.cuda() for part in packed))
    expected = dequantize(packed, fmt, (100, 96), torch.float32)
    assert_close(dequantize(on_gpu, fmt, (100, 96), torch.float32).cpu(), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prepared_model_computes_the_same_on_both_devices(architecture):
    model = qrefta.prepare(ARCHITECTURES[architecture](), rank=5)
    expected = logits(model)
    assert_close(logits(model.cuda()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_preparing_on_the_gpu_removes_the_same_error(architecture):
    """Singular vectors may differ where values are close; what they remove may not."""
    on_cpu = qrefta.prepare(ARCHITECTURES[architecture](), rank=5)
    on_gpu = qrefta.prepare(ARCHITECTURES[architecture]().cuda(), rank=5)
    for ours, theirs in zip(qrefta.quant_report(on_gpu), qrefta.quant_report(on_cpu), strict=True):
        assert ours["ratio"] == pytest.approx(theirs["ratio"], abs=0.02)
        assert ours["principal_energy"] == pytest.approx(theirs["principal_energy"], rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"quant_type": "int4"}, {"calibration": True}], ids=str)
def test_a_stack_at_a_time_goes_to_the_gpu_and_comes_back(options):
    """Same seed, same device: same bits. The model stays where it was; the error is that of the CPU."""
    model = ARCHITECTURES["llama_gqa"]
    if "calibration" in options:
        options = {"calibration": [inputs(model())]}
    first, second = (qrefta.prepare(model(), rank=5, device="cuda", **options) for _ in range(2))
    assert {tensor.device.type for tensor in first.state_dict().values()} == {"cpu"}
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
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


def test_preparing_with_a_gpu_holds_a_stack_there_and_not_the_model():
    model = ARCHITECTURES["bert"]()
    largest = max(4 * module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    layers = model.config.num_hidden_layers
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    qrefta.prepare(model, rank=5, device="cuda")
    assert torch.cuda.max_memory_allocated() - before <= 12 * layers * largest + (32 << 20)  # cuBLAS has a workspace
    assert torch.cuda.memory_allocated() - before < layers * largest


def test_gradients_are_those_of_the_cpu():
    on_cpu = qrefta.prepare(ARCHITECTURES["bert"](), rank=5)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for model in (on_cpu, on_gpu):
        batch = {name: tensor.to(model.device) for name, tensor in inputs(model).items()}
        model(**batch).logits.square().sum().backward()
    for (name, ours), theirs in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        if ours.requires_grad:
            assert_close(
                ours.grad.cpu(), theirs.grad, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_saving_from_the_gpu_and_loading_on_the_cpu_keeps_the_bits(tmp_path):
    model = qrefta.prepare(ARCHITECTURES["llama_gqa"]().cuda(), rank=5)
    model.save_pretrained(tmp_path)
    loaded = qrefta.load(tmp_path)
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.cpu().to(ours.dtype)), name
