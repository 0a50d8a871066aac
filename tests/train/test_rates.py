"""The learning rate by default: from measured rows, by what trains; and the warning of a far higher
one.
"""

import copy
import warnings

import pytest
import torch
from transformers import TrainerCallback

import qrefta
from qrefta.methods import METHODS
from qrefta.train.arguments import training_arguments
from qrefta.train.models import load_classifier
from qrefta.train.rates import (
    CALIBRATED_RATE,
    FULL_RATE,
    LORA_RATE,
    RATES,
    chosen_rate,
    measured_rate,
    parse_rate,
    warn_of_rate,
)
from tests.models import prepared, tiny_bert, tiny_llama
from tests.tiny import color_data, tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    return qrefta.prepare(
        load_classifier(str(folder), ["red", "blue"], seed=0), rank=8, method="lorta"
    )


class Seen(TrainerCallback):
    """Remembers the learning rate of a run."""

    def on_train_begin(self, args, *_, **__):
        self.rate = args.learning_rate


def run(model, out, **settings):
    """The learning rate of a short run."""
    seen = Seen()
    qrefta.finetune(
        copy.deepcopy(model), tiny_tokenizer(), color_data(), out, callbacks=[seen], **settings
    )
    return seen.rate


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_measured_rate(method):
    model = prepared(tiny_bert, rank=2, refine=0, method=method)
    assert measured_rate(model) == (RATES[method], f"method {method}")


def test_a_calibrated_refta_trains_at_the_rate_of_a_start_from_zero():
    model = tiny_llama()
    batches = [{"input_ids": torch.arange(96).view(4, 24)}]
    given = {"method": "refta", "rank": 2, "calibration": batches, "progress": False}
    plain = qrefta.prepare(copy.deepcopy(model), rounding="nearest", **given)
    assert measured_rate(plain) == (RATES["refta"], "method refta")
    found = measured_rate(qrefta.prepare(model, **given))
    assert found == (CALIBRATED_RATE, "method refta, calibrated")


def test_other_models_have_rates_too():
    peft = pytest.importorskip("peft")
    assert measured_rate(tiny_llama()) == (FULL_RATE, "all weights")
    lora = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    assert measured_rate(lora) == (LORA_RATE, "LoRA")


def test_a_run_takes_the_measured_rate_and_says_so(start, tmp_path, capsys):
    assert run(start, tmp_path / "auto", max_steps=1) == RATES["lorta"]
    written = capsys.readouterr()
    assert "Learning rate 0.003, the best measured for method lorta" in written.out + written.err


@pytest.mark.slow
def test_a_given_rate_holds_and_a_far_higher_one_is_told(start, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert (
            run(start, tmp_path / "given", max_steps=1, learning_rate=2e-2, progress=False) == 2e-2
        )
    with pytest.warns(UserWarning, match=r"0\.03 is 10 times 0\.003, the best .* method lorta"):
        run(start, tmp_path / "high", max_steps=1, learning_rate=3e-2, progress=False)
    with pytest.raises(ValueError, match="learning_rate is -1; it must be a positive number"):
        run(start, tmp_path / "bad", learning_rate=-1, progress=False)


def test_args_keep_their_rate(start, tmp_path):
    args = training_arguments("classify", tmp_path / "args", max_steps=1, learning_rate=7e-4)
    assert run(start, tmp_path / "args", args=args) == 7e-4


def test_a_far_higher_rate_in_args_is_told_at_the_line_of_the_call(start, tmp_path):
    args = training_arguments("classify", tmp_path / "args", max_steps=1, learning_rate=5e-2)
    with pytest.warns(UserWarning, match=r"0\.05 is 17 times 0\.003") as found:
        run(start, tmp_path / "args", args=args)
    (told,) = [one for one in found if "is 17 times" in str(one.message)]
    assert told.filename == __file__


def test_rates_are_read_from_the_command_line():
    assert parse_rate("auto") is None
    assert parse_rate("3e-4") == 3e-4
    for text in ("fast", "0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"--learning-rate is '{text}'; give a positive"):
            parse_rate(text)


def test_preferences_take_a_share_of_the_measured_rate(capsys):
    model = prepared(tiny_bert)
    best, _ = measured_rate(model)
    assert chosen_rate(model, None, True, "dpo") == pytest.approx(best / 20)
    assert "0.05 of the best measured" in capsys.readouterr().out
    assert chosen_rate(model, None, False, "sft") == best
    assert chosen_rate(model, 0.5, False, "grpo") == 0.5


def test_arguments_without_a_rate_take_the_measured_one(start, tmp_path, capsys):
    args = training_arguments("classify", tmp_path / "unset", max_steps=1)
    assert run(start, tmp_path / "unset", args=args) == 3e-3
    assert "Learning rate 0.003, the best measured" in capsys.readouterr().out


def test_the_warning_knows_the_task(start):
    warn_of_rate(start, 3e-3)
    with pytest.warns(UserWarning, match=r"0\.003 is 20 times 0\.00015, 0\.05 of the best"):
        warn_of_rate(start, 3e-3, "dpo")
