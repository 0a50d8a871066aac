"""The same code on a GPU: equal to the CPU up to rounding. Skipped where there is none."""

import copy

import pytest
import torch
from torch.testing import assert_close

import qrefta
from qrefta.quantize import QuantFormat, dequantize, quantize
from tests.models import ARCHITECTURES, inputs, logits

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
