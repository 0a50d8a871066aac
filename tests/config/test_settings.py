"""Settings: allowed and refused values, and the keywords of the public functions."""

import inspect
import warnings
from dataclasses import fields

import pytest
import torch

import qrefta
from qrefta.config.call import settings_of_call
from qrefta.config.rank import RankBudget
from qrefta.config.settings import Settings, SettingsKeywords
from qrefta.hf_config import FORMAT_VERSION, QReftaConfig
from qrefta.nn.factors import factor_dtype
from qrefta.nn.quantized import QuantFormat

MIXED = {"bits": "auto", "target_bits": 3.3}


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 1.5])
def test_seeds_are_those_that_all_generators_take(seed):
    with pytest.raises(ValueError, match=r"seed is .*(0 or more|the largest is 4294967295)"):
        Settings(seed=seed)
    assert Settings(seed=2**32 - 1).seed == 2**32 - 1


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
    ],
)
def test_errors_name_the_given_and_the_allowed_values(settings, message):
    with pytest.raises(ValueError, match=message):
        QReftaConfig(**settings)


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
    "setting", [{"quant_type": "fp4"}, {"double_quant": True}, {"block_size": 128}], ids=str
)
def test_a_format_without_quantization_is_told(setting):
    (name,) = setting
    for call in (QReftaConfig, lambda **keywords: settings_of_call("prepare", keywords)):
        with pytest.warns(UserWarning, match=f"{name}=.* has no effect with bits=16"):
            call(bits=16, **setting)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(bits=4, **setting)
            call(bits=16, quant_type=None, double_quant=False, block_size=None)


@pytest.mark.parametrize(
    ("bits", "block_size"), [(4, 64), (3, 32), (2, 32), ("auto", 32), (16, None)]
)
def test_blocks_are_smaller_below_four_bits(bits, block_size):
    target = {"target_bits": 3.4} if bits == "auto" else {}
    assert Settings(bits=bits, **target).block_size == block_size
    assert Settings(bits=bits, block_size=128, **target).block_size == 128


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
