"""Arguments of a run: from keywords, from TrainingArguments, from both, from older keywords."""

import re
from math import inf, nan

import pytest
from transformers import TrainingArguments

from qrefta import finetune
from qrefta._deprecations import deprecated_keywords
from qrefta.train.arguments import DEFAULTS, run_arguments, training_arguments
from tests.models import prepared, tiny_bert, tiny_llama

SFTConfig = pytest.importorskip("trl").SFTConfig
# the only name before transformers 5.24; TRL 1.16 still uses it
old_name = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def model():
    return prepared(tiny_bert, rank=2, refine=0)


def test_without_args_the_defaults_are_ours(model):
    found = run_arguments(model, "classify", None, "out", {})
    for name, value in DEFAULTS.items():
        expected = [] if name == "report_to" else value
        assert getattr(found, name) == expected, name
    assert found.output_dir == "out"
    assert found.per_device_eval_batch_size == 64
    assert found.ddp_find_unused_parameters is False
    assert not found.gradient_checkpointing


def test_a_plain_model_leaves_the_search_for_unused_parameters_to_trainer():
    found = run_arguments(tiny_bert(), "classify", None, "out", {})
    assert found.ddp_find_unused_parameters is None


def test_keywords_fill_the_fields_that_args_leave_at_their_defaults(model):
    args = TrainingArguments("out", warmup_steps=7, weight_decay=0.1, seed=3)
    settings = {
        "learning_rate": 1e-2,
        "seed": 3,
        "gradient_checkpointing": True,
        "disable_tqdm": True,
    }
    found = run_arguments(model, "classify", args, "out", settings)
    assert (found.warmup_steps, found.weight_decay, found.seed) == (7, 0.1, 3)
    assert found.learning_rate == 1e-2
    assert found.num_train_epochs == 3  # the default of TrainingArguments
    assert found.disable_tqdm
    assert found.gradient_checkpointing
    assert found.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert found.eval_on_start
    assert not args.gradient_checkpointing
    assert args.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("given", "keywords", "message"),
    [
        (
            {"learning_rate": 1e-4},
            {"learning_rate": 1e-3},
            r"learning_rate=0\.001 contradicts args, where learning_rate=0\.0001; give one",
        ),
        (
            {"num_train_epochs": 2},
            {"epochs": 1},
            "epochs=1 contradicts args, where num_train_epochs=2",
        ),
        (
            {"per_device_train_batch_size": 4},
            {"batch_size": 2},
            "batch_size=2 .*per_device_train_batch_size=4",
        ),
        ({"max_steps": 4}, {"max_steps": -1}, "max_steps=-1 .*max_steps=4"),
        ({"seed": 4}, {"seed": 0}, "seed=0 .*seed=4"),
        ({"disable_tqdm": True}, {"progress": True}, "progress=True .*disable_tqdm=True"),
        ({}, {"output_dir": "other"}, "output_dir='other' .*output_dir='out'"),
        (
            {"bf16_full_eval": True, "use_cpu": True},
            {},
            r"args\.bf16_full_eval is not supported; Trainer would round",
        ),
        (
            {"fp16_full_eval": True, "use_cpu": True},
            {},
            r"args\.fp16_full_eval is not supported; Trainer would round",
        ),
        ({"push_to_hub": True}, {}, r"args\.push_to_hub is not supported; push the folder"),
        (
            {"resume_from_checkpoint": "x"},
            {},
            r"args\.resume_from_checkpoint is not supported; use finetune\(\.\.\., resume=True\)",
        ),
    ],
    ids=str,
)
def test_contradictions_of_args_are_refused(given, keywords, message, model):
    args = TrainingArguments("out", **given)
    with pytest.raises(ValueError, match=message):
        finetune(model, None, "no-such-file.csv", args=args, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 0}, "batch_size (--batch-size) is 0; it must be a whole number, 1 or more"),
        ({"batch_size": 2.5}, "batch_size (--batch-size) is 2.5; it must be a whole number"),
        ({"gradient_accumulation": 0}, "(--gradient-accumulation) is 0; it must be a whole number"),
        ({"gradient_accumulation": True}, "is True; it must be a whole number"),
        ({"max_steps": 1.5}, "max_steps (--max-steps) is 1.5; it must be a whole number of steps"),
        ({"epochs": -1}, "epochs (--epochs) is -1; it must be a number above 0, or give the steps"),
        ({"epochs": nan}, "epochs (--epochs) is nan; it must be a number above 0"),
        ({"max_steps": 0}, "max_steps (--max-steps) is 0; it must be a whole number of steps, or"),
        ({"max_steps": -5}, "max_steps (--max-steps) is -5; it must be a whole number of steps"),
        ({"epochs": inf}, "is inf; it must be a number above 0"),
        ({"epochs": "3", "max_steps": 1}, "epochs (--epochs) is '3'; it must be a number above 0"),
        ({"loss": "last"}, "loss='last' (--loss) is for the task sft; the task is 'classify'"),
        ({"loss": "first"}, "loss is 'first'; it must be one of all, last"),
        ({"learning_rate": -1}, "learning_rate is -1; it must be a positive number"),
    ],
    ids=str,
)
def test_numbers_and_choices_that_make_no_run_are_refused(keywords, message, model):
    """By keyword, and in args; before the data are read: there are none."""
    with pytest.raises(ValueError, match=re.escape(message)):
        finetune(model, None, "no-such-file.csv", "out", **keywords)
    with pytest.raises(ValueError, match=re.escape(message)):
        finetune(model, None, "no-such-file.csv", args=TrainingArguments("out"), **keywords)


@pytest.mark.filterwarnings("ignore:`pad_token`:FutureWarning")
@pytest.mark.parametrize("field", ["chat_template_path", "eos_token", "pad_token"])
def test_tokens_that_trl_would_set_too_late_are_refused(field, model):
    pytest.importorskip("trl")
    args = training_arguments("sft", "out", **{field: "<x>"})
    with pytest.raises(ValueError, match=rf"args\.{field} is not supported; set it on the tok"):
        finetune(model, None, "no-such-file.csv", task="sft", args=args)


def test_sizes_and_lengths_in_args_are_checked_too(model):
    with pytest.raises(ValueError, match=r"batch_size \(--batch-size\) is 0"):
        training_arguments("classify", "out", per_device_train_batch_size=0)
    args = TrainingArguments("out", num_train_epochs=0)
    with pytest.raises(ValueError, match=r"epochs \(--epochs\) is 0"):
        finetune(model, None, "no-such-file.csv", args=args)
    assert run_arguments(model, "classify", args, None, {"max_steps": 5}).max_steps == 5


def test_a_length_replaces_qreftas_default_in_args_and_no_other(model):
    ours = training_arguments("sft", "out")
    assert run_arguments(model, "sft", ours, None, {"max_length": 5}).max_length == 5
    theirs = training_arguments("sft", "out", max_length=7)
    with pytest.raises(ValueError, match="max_length=5 contradicts args, where max_length=7"):
        run_arguments(model, "sft", theirs, None, {"max_length": 5})


@old_name
def test_reentrant_checkpointing_in_args_is_refused(model):
    options = {"use_reentrant": True}
    args = TrainingArguments(
        "out", gradient_checkpointing=True, gradient_checkpointing_kwargs=options
    )
    with pytest.raises(ValueError, match="use_reentrant=True, which gives shared factors wrong"):
        finetune(model, None, "no-such-file.csv", args=args)


@old_name
def test_further_options_of_checkpointing_are_kept(model):
    options = {"every_n_layers": 2}
    args = TrainingArguments(
        "out", gradient_checkpointing=True, gradient_checkpointing_kwargs=options
    )
    found = run_arguments(model, "classify", args, None, {})
    assert found.gradient_checkpointing_kwargs == {"every_n_layers": 2, "use_reentrant": False}


def test_fsdp_names_the_blocks_and_keeps_the_callers_config(model):
    args = TrainingArguments("out", fsdp=True, fsdp_config={"reshard_after_forward": False})
    config = run_arguments(model, "classify", args, None, {}).fsdp_config
    assert config["transformer_layer_cls_to_wrap"] == ["BertLayer"]
    assert config["state_dict_type"] == "SHARDED_STATE_DICT"
    assert config["reshard_after_forward"] is False
    assert "transformer_layer_cls_to_wrap" not in args.fsdp_config


@old_name
def test_sft_takes_length_and_packing_from_an_sft_config():
    model = tiny_llama()
    args = SFTConfig("out", max_length=77, packing=True, use_cpu=True)
    found = run_arguments(model, "sft", args, None, {})
    assert isinstance(found, SFTConfig)
    assert (found.max_length, found.packing) == (77, True)
    assert found.gradient_checkpointing
    found = run_arguments(model, "sft", None, "out", {"max_length": 5})
    assert isinstance(found, SFTConfig)
    assert (found.max_length, found.packing) == (5, False)
    assert not found.gradient_checkpointing


@old_name
def test_a_keyword_switches_off_checkpointing_that_trl_switches_on():
    args = SFTConfig("out", use_cpu=True)
    off = {"gradient_checkpointing": False}
    assert not run_arguments(tiny_llama(), "sft", args, None, off).gradient_checkpointing


def test_sft_with_plain_arguments_and_packing_elsewhere_are_refused(model):
    with pytest.raises(
        ValueError, match="args is a TrainingArguments; this task needs a SFTConfig"
    ):
        finetune(model, None, "no-such-file", args=TrainingArguments("out"), task="sft")
    with pytest.raises(ValueError, match="packing is for the task sft; the task is 'lm'"):
        finetune(model, None, "no-such-file", "out", task="lm", packing=True)


def test_an_output_folder_is_needed(model):
    with pytest.raises(ValueError, match="output_dir is missing"):
        finetune(model, None, "no-such-file.csv")
    args = TrainingArguments()
    assert run_arguments(model, "classify", args, "here", {}).output_dir == "here"
    assert run_arguments(model, "classify", args, None, {}).output_dir == args.output_dir


def test_images_keep_their_column(model):
    args = TrainingArguments("out")
    assert not run_arguments(model, "image", args, None, {}).remove_unused_columns


OLD = {
    "warmup_steps": 3,
    "weight_decay": 0.5,
    "save_steps": 2,
    "optimizer": "sgd",
    "fsdp": True,
    "report_to": "tensorboard",
}


@pytest.mark.parametrize("name", OLD)
def test_older_keywords_still_work_with_a_warning(name, model, monkeypatch):
    taken = []

    def take(*arguments):
        taken.append(arguments[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr("qrefta.train.finetune.run_arguments", take)
    with (
        pytest.warns(DeprecationWarning, match=rf"finetune\({name}=\.\.\.\) .*use args="),
        pytest.raises(KeyboardInterrupt),
    ):
        finetune(model, None, "no-such-file.csv", "out", **{name: OLD[name]})
    field = "optim" if name == "optimizer" else name
    assert taken == [{field: OLD[name], "learning_rate": 1e-3}]
    assert field in {row.name for row in TrainingArguments.__dataclass_fields__.values()}


def test_older_keywords_do_not_mix_with_args(model):
    args = TrainingArguments("out")
    with (
        pytest.warns(DeprecationWarning, match="save_steps"),
        pytest.raises(ValueError, match="args and save_steps are both given"),
    ):
        finetune(model, None, "no-such-file.csv", args=args, save_steps=2)


def test_a_keyword_that_never_was_is_a_type_error(model):
    with pytest.raises(TypeError, match=r"finetune\(\) got an unexpected keyword argument 'warm'"):
        finetune(model, None, "no-such-file.csv", "out", warm=1)


def test_the_warning_points_at_the_callers_line():
    def public(**old):
        return deprecated_keywords("public", old, {"size": "length"})

    with pytest.warns(DeprecationWarning, match="use length") as warned:
        assert public(size=3) == {"size": 3}
    assert warned[0].filename == __file__
