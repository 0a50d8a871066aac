"""Settings, reports and the saved config: allowed values, refused values, JSON and back,
migration.
"""

import inspect
import json
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch

import qrefta
from qrefta.config import (
    FORMAT_VERSION,
    LayerStack,
    RankBudget,
    Settings,
    SettingsKeywords,
    StackReport,
    parse_bytes,
    parse_rank,
    settings_of_call,
)
from qrefta.hf_config import QReftaConfig
from qrefta.nn.factors import factor_dtype
from qrefta.nn.quantized import QuantFormat

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
        ({"method": "lora"}, "method is 'lora'; it must be one of refta"),
        ({"transform": "fft"}, "transform is 'fft'; it must be one of lsm3, dct, identity"),
        (
            {"transform": "dct", "method": "craft"},
            r"transform \(with method craft\) is 'dct'; it must be one of lsm3",
        ),
        ({"bits": 8}, "bits is 8; it must be one of 4, 3, 2, 16, auto"),
        ({"bits": "auto"}, 'bits is "auto" and target_bits is missing; give .* target_bits=3.3'),
        ({"target_bits": 3.3}, 'target_bits is 3.3 and bits is 4; .* bits="auto": give that, or'),
        ({"bits": 16, "target_bits": 3.3}, "target_bits is 3.3 and bits is 16"),
        ({"bits": "auto", "target_bits": "3.3"}, "target_bits is '3.3'; it must be a positive num"),
        ({"bits": "auto", "target_bits": 0}, "target_bits is 0; it must be a positive number"),
        ({"bits": "auto", "target_bits": True}, "target_bits is True; it must be a positive"),
        ({"bits": "auto", "target_bits": float("nan")}, "target_bits is nan; it must be a pos"),
        (
            {"bits": "auto", "target_bits": 3.3, "quant_type": "nf3"},
            'quant_type is .nf3. and bits is "auto", which chooses among nf2, nf3, nf4; leave',
        ),
        (
            MIXED | {"method": "refta", "rank": RankBudget(error_ratio=0.5)},
            "need the bits first: give a number as rank",
        ),
        (
            MIXED | {"stacks": [ROW_OF_FORMAT_1 | {"quant_type": "nf5"}]},
            "quant_type 'nf5', which no stack has",
        ),
        ({"quant_type": "int8"}, "quant_type is 'int8'; it must be one of nf4, fp4, int4"),
        ({"block_size": 100}, "block_size is 100; it must be one of 32, 64, 128"),
        ({"block_size": True}, "block_size is True"),
        ({"double_quant": 1}, "double_quant is 1; it must be one of False, True"),
        (
            {"factor_dtype": "float16"},
            "factor_dtype is 'float16'; it must be one of bfloat16, float32",
        ),
        (
            {"quant_type": "nf3"},
            "quant_type is 'nf3' and bits is 4; with bits=4 it must be one of nf4",
        ),
        ({"bits": 3, "quant_type": "int4"}, "with bits=3 it must be one of nf3, int3"),
        ({"rank": -1}, "rank is -1; it must be a whole number, 0 or more"),
        ({"rank": 2.5}, "rank is 2.5; it must be a whole number"),
        ({"rank": True}, "rank is True; it must be a whole number"),
        ({"rank": "many"}, "rank is 'many'; it must be a whole number"),
        ({"rank": (2, 0, 3)}, "each number of rank is 0"),
        ({"refine": -1}, "refine is -1; it must be a whole number, 0 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"modules_to_save": [1]}, r"modules_to_save is \[1\]; it must be a list of module names"),
        ({"target_modules": 3}, "target_modules is 3; it must be a list of module names"),
        ({"format_version": FORMAT_VERSION + 1}, "pip install -U qrefta"),
        ({"format_version": "1"}, "format version '1'"),
        ({"colour": "red"}, r"Unknown qrefta settings \['colour'\]"),
        ({"stacks": [{"stack": "x"}]}, "config.json is damaged"),
        ({"stacks": [3]}, "config.json is damaged"),
        ({"stacks": [ROW_OF_FORMAT_1 | {"layers": 3}]}, "3 layers for its 2 weights"),
        ({"stacks": [ROW_OF_FORMAT_1 | {"rank": -1}]}, "rank -1, which no stack has"),
        ({"stacks": {"a": 1}}, "it must be a list"),
    ],
)
def test_errors_name_the_given_and_the_allowed_values(settings, message):
    with pytest.raises(ValueError, match=message):
        QReftaConfig(**settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "got nothing; give exactly one of bytes, error_ratio and trainable_parameters"),
        ({"bytes": 1, "error_ratio": 0.5}, "give exactly one"),
        ({"bytes": "8 apples"}, "RankBudget bytes is '8 apples'"),
        ({"bytes": 0}, "RankBudget bytes is 0"),
        ({"error_ratio": 1.5}, "error_ratio is 1.5; .* at most 1"),
        ({"error_ratio": -1}, "must be a positive number"),
        ({"trainable_parameters": 0}, "trainable_parameters is 0"),
    ],
)
def test_a_budget_holds_exactly_one_value_in_range(given, message):
    with pytest.raises(ValueError, match=message):
        RankBudget(**given)


@pytest.mark.parametrize("budget", [RankBudget(bytes=1), RankBudget(error_ratio=0.5)], ids=str)
def test_budgets_that_weigh_error_need_4_bits(budget):
    with pytest.raises(ValueError, match="16 bits have none"):
        Settings(method="refta", rank=budget, bits=16)


@pytest.mark.parametrize("quant_type", ["int4", "nf5", None, 3, ["nf3"]], ids=str)
def test_bits_by_stack_are_2_3_or_4_whatever_a_file_says(quant_type):
    settings = Settings(**MIXED)
    with pytest.raises(ValueError, match=r"must be one of nf2, nf3, nf4\. config\.json is dam"):
        settings.of_stack(quant_type)
    assert Settings().of_stack(quant_type) == Settings()


def test_the_settings_of_a_stack_are_the_settings_with_its_bits():
    settings = Settings(rank=7, block_size=32, **MIXED)
    assert settings.of_stack("nf3") == Settings(bits=3, rank=7, block_size=32)
    assert settings.of_stack("nf4") == Settings(rank=7, block_size=32, double_quant=True)


def test_a_budget_of_error_needs_refta():
    with pytest.raises(ValueError, match=r"needs method refta, and method is 'windows'.*give meth"):
        Settings(rank=RankBudget(error_ratio=0.5))


@pytest.mark.parametrize("setting", [{"refine": 2}, {"transform": "dct"}], ids=str)
def test_a_setting_without_effect_is_told(setting):
    (name,) = setting

    def prepare(**keywords):
        return settings_of_call("prepare", keywords)

    for call in (QReftaConfig, prepare):
        with pytest.warns(
            UserWarning, match=f"{name}=.* has no effect with method windows"
        ) as told:
            call(**setting)
        assert told[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(method="refta", **setting)
            call(refine=0)


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ("auto", "auto"),
        ("16", 16),
        ("24,100,100", (24, 100, 100)),
        ("bytes=8MB", RankBudget(bytes=8_000_000)),
        ("bytes=1.5KiB", RankBudget(bytes=1536)),
        ("error=0.5", RankBudget(error_ratio=0.5)),
        ("parameters=300000", RankBudget(trainable_parameters=300_000)),
    ],
)
def test_a_rank_is_read_from_text(text, rank):
    assert parse_rank(text) == rank


@pytest.mark.parametrize("text", ["", "many", "1.5", "2,x", "size=3", "parameters=few", "auto,2"])
def test_other_text_for_a_rank_is_refused_with_the_forms(text):
    with pytest.raises(ValueError, match=r"it must be auto, a whole number \(16\), three"):
        parse_rank(text)


def test_bytes_are_read_from_numbers_and_text():
    assert [parse_bytes("x", size) for size in (5, "5", "2GB", "2 GiB", "1e3KB")] == [
        5,
        5,
        2 * 10**9,
        2 << 30,
        10**6,
    ]
    with pytest.raises(ValueError, match="x is 'plenty'; give a positive number of bytes"):
        parse_bytes("x", "plenty")


def test_whole_numbers_of_numpy_are_taken_and_stored_as_plain_ones():
    assert type(Settings(rank=np.int64(4)).rank) is int


def test_format_and_dtype():
    settings = Settings(quant_type="fp4", block_size=128, double_quant=True)
    assert QuantFormat.of(settings) == QuantFormat("fp4", 128, True)
    assert QuantFormat.of(Settings(bits=16)) is None
    assert factor_dtype(Settings(factor_dtype="float32")) == torch.float32


@pytest.mark.parametrize("function", [qrefta.prepare, qrefta.prepare_checkpoint, qrefta.plan])
def test_every_setting_is_a_documented_argument(function):
    """A new setting is a field of Settings and a line of SettingsKeywords."""
    parameters = inspect.signature(function).parameters
    shown = {name: parameter.default for name, parameter in parameters.items()}
    for setting in fields(Settings):
        assert shown[setting.name] == setting.default
        assert f"        {setting.name}:" in inspect.getdoc(Settings).replace("    ", "        ")
        assert setting.metadata["help"].endswith(".")
    assert QReftaConfig().to_dict().keys() >= {setting.name for setting in fields(Settings)}


def test_type_checkers_see_every_setting():
    types = inspect.get_annotations(Settings, eval_str=True)
    del types["bits"], types["rank"]
    assert inspect.get_annotations(SettingsKeywords, eval_str=True) == types


@pytest.mark.parametrize(
    "keywords",
    [{"ranks": [1, 2, 3]}, {"trained_params": 9}, {"rank": "auto", "budget_mb": 1}],
    ids=str,
)
def test_old_rank_settings_work_with_a_warning(keywords):
    with pytest.warns(DeprecationWarning, match="give a tuple or a qrefta.RankBudget as rank"):
        settings = settings_of_call("prepare", keywords)
    assert not isinstance(settings.rank, str)


def test_an_unknown_keyword_is_named_with_the_settings():
    with pytest.raises(TypeError, match=r"prepare\(\) got an unexpected keyword 'rnk'; .* rank"):
        settings_of_call("prepare", {"rnk": 3})
