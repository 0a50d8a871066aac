"""The dtype that a model is loaded in on a processor without instructions for bfloat16."""

import platform
import warnings
from pathlib import Path

import pytest
import torch

from qrefta._compat.torch import has_bf16_instructions
from qrefta.files.sources import pretrained_source
from qrefta.model import dtype
from qrefta.model.dtype import loading_dtype, warn_of_slow_dtype
from tests.models import tiny_llama

CPUINFO = Path("/proc/cpuinfo")


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(dtype, "has_bf16_instructions", lambda: False)


def source_of(folder, stored):
    tiny_llama().to(stored).save_pretrained(folder)
    return pretrained_source(folder)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(), reason="reads the flags of Linux on x86"
)
def test_the_processors_flags_tell_the_same():
    flags = CPUINFO.read_text().split()
    assert has_bf16_instructions() == bool({"avx512_bf16", "amx_bf16"}.intersection(flags))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_becomes_float32_on_a_slow_cpu_alone(stored, slow, tmp_path, monkeypatch):
    source = source_of(tmp_path, stored)
    assert loading_dtype(source, "cpu") == ("auto" if stored == torch.float32 else torch.float32)
    assert loading_dtype(source, "cuda") == "auto"
    monkeypatch.setattr(dtype, "has_bf16_instructions", lambda: True)
    assert loading_dtype(source, "cpu") == "auto"


@pytest.mark.parametrize(
    ("stored", "bf16", "message"),
    [
        (torch.float32, True, "computes in bfloat16.*To change it, leave bf16 out;"),
        (torch.bfloat16, False, "computes in bfloat16.*load the model with dtype=torch.float32;"),
        (torch.float16, False, "computes in float16.*load the model with dtype=torch.float32;"),
        (torch.bfloat16, True, "load the model with dtype=torch.float32 and leave bf16 out;"),
    ],
    ids=str,
)
def test_a_slow_run_is_warned_of_with_the_fix(stored, bf16, message, slow):
    model = tiny_llama().to(stored)
    with pytest.warns(UserWarning, match=message):
        warn_of_slow_dtype(model, "cpu", bf16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_dtype(model, "cuda", bf16)


def test_float32_and_fast_processors_give_no_warning(slow, monkeypatch):
    warnings.simplefilter("error")
    warn_of_slow_dtype(tiny_llama(), "cpu", bf16=False)
    monkeypatch.setattr(dtype, "has_bf16_instructions", lambda: True)
    warn_of_slow_dtype(tiny_llama().to(torch.bfloat16), "cpu", bf16=True)
