"""Stack reports and the saved config: JSON and back, migration, ratios and bits."""

import json

import pytest

from qrefta.config.rank import RankBudget
from qrefta.config.report import StackReport
from qrefta.config.stack import LayerStack
from qrefta.hf_config import FORMAT_VERSION, QReftaConfig

REPORT = StackReport(
    stack=LayerStack("layers.*.proj", ("layers.0.proj", "layers.1.proj"), 3, 4),
    rank=2,
    slice_ranks=(2, 0),
    transform="lsm3",
    quant_type="nf4",
    baseline_error=2.0,
    residual_error=1.0,
    principal_energy=0.25,
    bytes=100,
)
ROW_OF_FORMAT_1 = {
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
    "output_error": None,
    "output_ratio": None,
    "experts": 0,
}
MIXED = {"bits": "auto", "target_bits": 3.3}
OLD_SETTINGS = {"ranks": None, "trained_params": None, "budget_mb": None, "error_ratio": None}


@pytest.mark.parametrize(
    "rank", [7, (2, 3, 4), RankBudget(bytes="1MB"), RankBudget(error_ratio=0.5)], ids=str
)
def test_json_and_back_keeps_everything(rank):
    config = QReftaConfig(
        method="refta",
        rank=rank,
        quant_type="int4",
        target_modules=["proj"],
        modules_to_save="head",
        stacks=[REPORT],
        base_model="a/b",
        calibrated=True,
    )
    again = QReftaConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.settings == config.settings
    assert again.stacks == [REPORT]


def test_a_row_of_format_1_is_migrated():
    old = {"format_version": 1, "rank": 2, **OLD_SETTINGS, "stacks": [ROW_OF_FORMAT_1]}
    config = QReftaConfig.from_dict(old)
    assert config.stacks == [REPORT]
    assert config.to_dict()["format_version"] == FORMAT_VERSION
    calibrated = ROW_OF_FORMAT_1 | {"output_error": 3.0, "output_ratio": 0.75}
    report = StackReport.from_dict(calibrated)
    assert (report.output_error, report.output_baseline, report.output_ratio) == (3.0, 4.0, 0.75)


@pytest.mark.parametrize(
    ("old", "rank"),
    [
        ({"rank": 16, "ranks": [2, 3, 4]}, (2, 3, 4)),
        ({"rank": 16, "trained_params": 5000}, RankBudget(trainable_parameters=5000)),
        ({"rank": "auto", "budget_mb": 0.02}, RankBudget(bytes=20_000)),
        ({"rank": "auto", "error_ratio": 0.5}, RankBudget(error_ratio=0.5)),
        ({"rank": 5}, 5),
    ],
    ids=str,
)
def test_rank_settings_of_format_1_are_migrated(old, rank):
    config = QReftaConfig.from_dict({"format_version": 1, **OLD_SETTINGS, **old})
    assert config.settings.rank == rank


def test_ranks_of_an_older_file_that_are_no_list_are_refused():
    with pytest.raises(ValueError, match="ranks is 5; give the three ranks"):
        QReftaConfig.from_dict({"format_version": 1, **OLD_SETTINGS, "ranks": 5})


def test_a_report_states_ratios_and_bits_without_loading_details():
    shown = REPORT.report()
    assert set(ROW_OF_FORMAT_1) - set(shown) == {"modules", "transposed"}
    assert shown.keys() <= ROW_OF_FORMAT_1.keys()
    expected = ROW_OF_FORMAT_1 | {"bits_per_weight": 8 * 100 / 24}
    assert all(shown[name] == expected[name] for name in shown)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bits": "auto", "target_bits": 3.3}
            | {"stacks": [ROW_OF_FORMAT_1 | {"quant_type": "nf5"}]},
            "quant_type 'nf5', which no stack has",
        ),
        ({"stacks": [{"stack": "x"}]}, "config.json is damaged"),
        ({"stacks": [3]}, "config.json is damaged"),
        ({"stacks": [ROW_OF_FORMAT_1 | {"layers": 3}]}, "3 layers for its 2 weights"),
        ({"stacks": [ROW_OF_FORMAT_1 | {"rank": -1}]}, "rank -1, which no stack has"),
        ({"stacks": {"a": 1}}, "it must be a list"),
    ],
    ids=str,
)
def test_damaged_reports_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QReftaConfig(**settings)
