"""QReftaConfig: what is allowed, what is refused, and the way to JSON and back."""

import json

import numpy as np
import pytest
import torch

from qrefta.config import FORMAT_VERSION, StackRow
from qrefta.hf_config import QReftaConfig
from qrefta.nn.quantized import QuantFormat

ROW = {
    "stack": "layers.*.proj",
    "modules": ["layers.0.proj", "layers.1.proj"],
    "transposed": False,
    "layers": 2,
    "shape": [3, 4],
    "rank": 2,
    "slice_ranks": [2, 0],
    "transform": "lsm3",
    "quant_type": "nf4",
    "baseline_error": 2.0,
    "residual_error": 1.0,
    "ratio": 0.5,
    "principal_energy": 0.25,
    "bytes": 100,
    "bits_per_weight": 33.3,
}


def test_json_and_back_keeps_everything():
    config = QReftaConfig(
        rank=7, transform="dct", quant_type="int4", target_modules=["proj"], stacks=[ROW]
    )
    again = QReftaConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.stacks == [StackRow(**ROW)]


def test_report_leaves_out_what_only_loading_needs():
    shown = StackRow(**ROW).report()
    assert set(ROW) - set(shown) == {"modules", "transposed"}
    assert shown.keys() - ROW.keys() == {"output_error", "output_ratio", "experts"}
    assert all(shown[name] == ROW[name] for name in shown.keys() & ROW.keys())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lora"}, "method is 'lora'; it must be one of refta"),
        ({"transform": "fft"}, "transform is 'fft'; it must be one of lsm3, dct, identity"),
        ({"bits": 8}, "bits is 8; it must be one of 4, 16"),
        ({"quant_type": "int8"}, "quant_type is 'int8'; it must be one of nf4, fp4, int4"),
        ({"block_size": 100}, "block_size is 100; it must be one of 64, 128"),
        (
            {"factor_dtype": "float16"},
            "factor_dtype is 'float16'; it must be one of bfloat16, float32",
        ),
        ({"rank": 0}, "rank is 0; it must be a whole number, 1 or more"),
        ({"rank": 2.5}, "rank is 2.5; it must be a whole number"),
        ({"rank": True}, "rank is True; it must be a whole number"),
        ({"refine": -1}, "refine is -1; it must be a whole number, 0 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"format_version": FORMAT_VERSION + 1}, "pip install -U qrefta"),
        ({"format_version": "1"}, "format version '1'"),
        ({"colour": "red"}, r"Unknown qrefta settings \['colour'\]"),
        ({"stacks": [{"stack": "x"}]}, "config.json is damaged"),
        ({"stacks": [3]}, "config.json is damaged"),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(settings, message):
    with pytest.raises(ValueError, match=message):
        QReftaConfig(**settings)


def test_whole_numbers_of_numpy_are_taken_and_stored_as_plain_ones():
    assert type(QReftaConfig(rank=np.int64(4)).rank) is int


def test_format_and_dtype():
    assert QReftaConfig(quant_type="fp4", block_size=128, double_quant=True).format == QuantFormat(
        "fp4", 128, True
    )
    assert QReftaConfig(bits=16).format is None
    assert QReftaConfig(factor_dtype="float32").torch_factor_dtype == torch.float32
