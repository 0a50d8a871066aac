"""The share of weights in 4 bits, by tool, compared with models that the tools made."""

import bitsandbytes
import pytest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qrefta
from eval.studies.coverage import coverage
from qrefta.nn.linear import AdaptedLinear
from tests.models import tiny_llama, tiny_mixtral


def packed(model, kind):
    """Weights in 4 bits, two per byte, in all layers of a class."""
    return sum(2 * layer.weight.numel() for layer in model.modules() if isinstance(layer, kind))


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_counts_equal_the_layers_that_the_tools_quantize(make, tmp_path):
    dense = make()
    counted = coverage(dense.config)
    dense.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    ours = qrefta.prepare(dense, rank=2, refine=0, progress=False)
    assert counted["bitsandbytes"]["quantized"] == packed(theirs, bitsandbytes.nn.Linear4bit)
    assert counted["qrefta"]["quantized"] == packed(ours, AdaptedLinear)
    assert counted["qrefta"]["weights"] == make().num_parameters()
    assert (counted["qrefta"] == counted["bitsandbytes"]) == (make is tiny_llama)
