"""Preference data, and DPO and GRPO whose reference is the model at its start."""

import copy
import re
import warnings

import pytest
import torch
from datasets import Dataset, DatasetDict

import qrefta
from qrefta.train.arguments import training_arguments
from qrefta.train.calibration import task_batches
from qrefta.train.reference import StartsAsReference, reference_model
from qrefta.train.rewards import load_reward
from qrefta.train.tasks import TASKS, load_preferences, load_prompts
from qrefta.train.tasks.dpo import dpo_recipe
from qrefta.train.tasks.prompts import token_ids
from qrefta.train.tasks.recipe import combined
from tests.models import logits, tiny_llama
from tests.train.talk import ANSWER, QUESTION, chat_rows, pair_rows, write_rows

trl = pytest.importorskip("trl")
# TRL 1.16 switches checkpointing on and off by its old names
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
WORSE = [{"role": "assistant", "content": "red"}]
METHODS = [{"method": "windows"}, {"method": "refta", "refine": 0}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "chosen": ANSWER, "rejected": WORSE},
        {"chosen": QUESTION + ANSWER, "rejected": QUESTION + WORSE},
        {"prompt": "x", "chosen": QUESTION + ANSWER, "rejected": QUESTION + WORSE},
        {"question": "what is sky ?", "chosen": "blue", "rejected": "red"},
        {"instruction": "what is sky ?", "input": "", "chosen": "blue", "rejected": "red"},
        {
            "conversations": [{"from": "human", "value": "what is sky ?"}],
            "chosen": {"from": "gpt", "value": "blue"},
            "rejected": {"from": "gpt", "value": "red"},
        },
        {"messages": QUESTION + ANSWER, "chosen": ANSWER, "rejected": WORSE},
        {"chosen": QUESTION + ANSWER + QUESTION, "rejected": QUESTION + WORSE},
        {"prompt": QUESTION, "chosen": ANSWER, "rejected": WORSE + QUESTION},
    ],
)
def test_the_usual_columns_become_pairs(row, tmp_path):
    data = load_preferences(write_rows(tmp_path / "pairs.jsonl", [row] * 20), 0)
    assert {name: len(part) for name, part in data.items()} == {"train": 18, "test": 2}
    assert data["train"][0] == {"prompt": QUESTION, "chosen": ANSWER, "rejected": WORSE}


def test_pairs_of_text_stay_text_and_system_turns_and_tools_are_kept(tmp_path):
    row = {"prompt": "sky is", "chosen": " blue", "rejected": " red"}
    data = load_preferences(write_rows(tmp_path / "text.jsonl", [row] * 4), 0)
    assert data["train"][0] == row
    row = {"question": "q", "chosen": "a", "rejected": "b", "tools": [{"n": 1}]}
    for system in ("system", "system_prompt"):
        data = load_preferences(write_rows(tmp_path / "a.jsonl", [row | {system: "red"}] * 4), 0)
        assert data["train"][0]["prompt"][0] == {"role": "system", "content": "red"}
        assert data["train"][0]["tools"] == [{"n": 1}]


def test_text_with_a_history_or_a_system_message_becomes_turns(tmp_path):
    history = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "red"}]
    expected = [{"role": "system", "content": "s"}, *history, *QUESTION]
    row = {"prompt": "what is sky ?", "history": [["is", "red"]], "system": "s"}
    data = load_prompts(write_rows(tmp_path / "prompts.jsonl", [row] * 4), 0)
    assert data["train"][0]["prompt"] == expected
    pairs = [row | {"chosen": "blue", "rejected": "red"}] * 4
    data = load_preferences(write_rows(tmp_path / "pairs.jsonl", pairs), 0)
    assert data["train"][0] == {"prompt": expected, "chosen": ANSWER, "rejected": WORSE}


def test_a_question_stays_before_turns_that_both_answers_begin_with(tmp_path):
    """The answers are the last turns of two dialogues that go on from the prompt."""
    more = [{"role": "assistant", "content": "red"}, {"role": "user", "content": "no"}]
    row = {"prompt": QUESTION, "chosen": more + ANSWER, "rejected": more + WORSE, "system": "s"}
    system = [{"role": "system", "content": "s"}]
    data = load_preferences(write_rows(tmp_path / "a.jsonl", [row] * 4), 0)
    expected = {"prompt": system + QUESTION + more, "chosen": ANSWER, "rejected": WORSE}
    assert data["train"][0] == expected
    whole = {name: QUESTION + row[name] for name in ("chosen", "rejected")} | {"system": "s"}
    data = load_preferences(write_rows(tmp_path / "b.jsonl", [whole] * 4), 0)
    assert data["train"][0] == expected


def test_prompts_keep_the_columns_that_the_reward_reads(tmp_path):
    rows = [{"question": "what is sky ?", "answer": 4}] * 4
    data = load_prompts(write_rows(tmp_path / "a.jsonl", rows), 0)
    assert data["train"][0] == rows[0] | {"prompt": QUESTION}
    rows = [{"prompt": "sky is", "answer": 4}] * 4
    assert load_prompts(write_rows(tmp_path / "b.jsonl", rows), 0)["train"][0] == rows[0]
    data = load_prompts(write_rows(tmp_path / "c.jsonl", chat_rows(4)), 0)
    assert [turn["role"] for turn in data["train"][0]["prompt"]] == ["user"]


@pytest.mark.parametrize(
    ("load", "row", "message"),
    [
        (load_preferences, {"prompt": QUESTION, "chosen": ANSWER}, "column rejected: there is no"),
        (load_preferences, {"chosen": ANSWER, "rejected": WORSE}, "needed is one of prompt, quest"),
        (
            load_preferences,
            {"prompt": QUESTION, "chosen": QUESTION, "rejected": WORSE},
            "column chosen: the answer is .*, not the assistant's",
        ),
        (
            load_preferences,
            {"prompt": QUESTION, "chosen": [{"role": "x", "content": "y"}], "rejected": WORSE},
            "column chosen, turn 1 is",
        ),
        (load_prompts, {"answer": 3}, "needed is one of prompt, question"),
        (load_prompts, {"messages": ANSWER}, "column messages: there is no turn before the answer"),
    ],
)
def test_bad_rows_are_refused_with_their_place(load, row, message, tmp_path):
    good = {"prompt": QUESTION, "chosen": ANSWER, "rejected": WORSE}
    file = write_rows(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(ValueError, match=rf"rows\.jsonl \(train\), row 2\W.*{message}"):
        load(file, 0)


def test_pairs_of_equal_answers_are_left_out_and_counted(tmp_path):
    row = {"prompt": QUESTION, "chosen": ANSWER, "rejected": WORSE}
    equal = row | {"rejected": ANSWER}
    file = write_rows(tmp_path / "a.jsonl", [equal, *[row] * 20])
    with pytest.warns(UserWarning, match="in 1 of 21 rows chosen and rejected are equal"):
        data = load_preferences(file, 0)
    assert sum(map(len, data.values())) == 20
    with pytest.raises(ValueError, match="chosen and rejected are equal in every row"):
        load_preferences(write_rows(tmp_path / "b.jsonl", [equal] * 3), 0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("b", "  ", "column rejected: there is no answer but '  '"),
        (None, "b", "column chosen: there is no answer but None"),
        (
            QUESTION + ANSWER,
            [{"role": "user", "content": "and blood ?"}, *WORSE],
            "begin with different turns, .*sky.* and .*blood",
        ),
    ],
)
def test_pairs_that_are_none_are_refused(chosen, rejected, message, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"p": 1, "chosen": chosen, "rejected": rejected}])
    with pytest.raises(ValueError, match=rf"a\.jsonl \(train\), row 1\W.*{message}"):
        load_preferences(file, 0)


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_a_column_of_another_name_is_told_with_the_columns_that_there_are(name, tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    row["other"] = row.pop(name)
    with pytest.raises(ValueError, match=rf"there is no column {name}; the columns are .*'other'"):
        load_preferences(write_rows(tmp_path / "a.jsonl", [row] * 3), 0)


def test_csv_files_hold_pairs_and_prompts_with_numbers_for_the_reward(tmp_path):
    (tmp_path / "a.csv").write_text("Prompt,Chosen,Rejected\n1+1=,2,3\n2+2=,4,NA\n")
    data = load_preferences(tmp_path / "a.csv", 0)
    pairs = sorted((row["chosen"], row["rejected"]) for part in data.values() for row in part)
    assert pairs == [("2", "3"), ("4", "NA")]
    (tmp_path / "b.csv").write_text("Prompt,answer,share,name\n1,2,0.5,a\n2,3,1,b\n")
    row = load_prompts(tmp_path / "b.csv", 0)["train"][0]
    assert row in (
        {"prompt": "1", "answer": 2, "share": 0.5, "name": "a"},
        {"prompt": "2", "answer": 3, "share": 1.0, "name": "b"},
    )


def test_pairs_that_are_cut_or_have_no_answer_before_the_cut_are_counted(tokenizer):
    """TRL leaves out the second without a word."""
    rows = pair_rows(4)
    tokens = len(token_ids(rows[0], tokenizer, answer=True))
    rows[0]["prompt"] = [{"role": "user", "content": "what is sky ? " * 9}]
    rows[1]["rejected"] = [{"role": "assistant", "content": "red " * 9}]
    part = Dataset.from_list(rows)
    data = DatasetDict(train=part, test=part)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dpo_recipe(tiny_llama(), tokenizer, data, tokens)
    told = [str(row.message) for row in caught]
    assert (
        f"1 of 4 rows of the train split have no answer in their first {tokens} tokens" in told[0]
    )
    assert f"1 of 4 rows of the train split have more than {tokens} tokens" in told[1]
    with pytest.raises(ValueError, match="No row of the train split has an answer in its first 2"):
        dpo_recipe(tiny_llama(), tokenizer, data, 2)


# The reference


@pytest.mark.parametrize("settings", METHODS)
def test_the_reference_shares_frozen_weights_and_keeps_its_factors(settings):
    model = qrefta.prepare(tiny_llama(), rank=8, progress=False, **settings)
    with torch.no_grad():  # a model that was trained before
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    start = logits(model)
    reference = reference_model(model)
    assert logits(reference).equal(start)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    for parameter, kept in pairs:
        assert (parameter.data_ptr() == kept.data_ptr()) != parameter.requires_grad
        assert not kept.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not logits(model).equal(start)
    assert logits(reference).equal(start)


def finetuned(model, tokenizer, file, out, task, **options):
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "max_steps": 8} | options
    keywords = {name: settings.pop(name) for name in ("reward", "resume") if name in settings}
    args = training_arguments(task, out, save_strategy="no", disable_tqdm=True, **settings)
    return qrefta.finetune(model, tokenizer, file, task=task, args=args, **keywords)


@pytest.mark.slow
@pytest.mark.parametrize("settings", METHODS)
def test_dpo_prefers_the_better_answers(settings, tokenizer, tmp_path, capsys):
    """Before training, model and reference are equal, so the loss is log 2."""
    file = write_rows(tmp_path / "pairs.jsonl", pair_rows(60))
    model = qrefta.prepare(tiny_llama(), rank=48, progress=False, **settings)
    result = finetuned(model, tokenizer, file, tmp_path / "out", "dpo", max_steps=20)
    assert result.test_loss_before == pytest.approx(0.6931, abs=1e-4)
    assert result.test_loss < 0.6
    assert result.accuracy_before == 0.0
    assert result.accuracy_after > 0.9
    assert result.reward_after is None
    shown = capsys.readouterr().out
    assert "step 0 of 20: test loss 0.6931, accuracy 0.0%" in shown
    assert re.search(r"step 20 of 20: loss [\d.]+, accuracy [\d.]+%, learning rate", shown)


REWARD = """
def blue(prompts, completions, **columns):
    assert set(columns) >= {"wanted"}
    texts = [turns[0]["content"] for turns in completions]
    return [text.split().count(word) / 4 for text, word in zip(texts, columns["wanted"])]
"""


@pytest.mark.slow
def test_grpo_follows_the_reward_and_its_reference_is_the_start(tokenizer, tmp_path, capsys):
    """The dense model is never loaded: its folder is gone when training begins."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    dense = type(tiny_llama()).from_pretrained(tmp_path / "dense")
    model = qrefta.prepare(dense, rank=48, progress=False)
    (tmp_path / "dense").rename(tmp_path / "gone")
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": QUESTION, "wanted": "blue", "number": 1}] * 40
    result = finetuned(
        model,
        tokenizer,
        write_rows(tmp_path / "prompts.jsonl", rows),
        tmp_path / "out",
        "grpo",
        reward=f"{tmp_path / 'reward.py'}:blue",
        beta=0.01,
        num_generations=8,
        max_completion_length=4,
        per_device_train_batch_size=32,
        max_steps=40,
        learning_rate=3e-2,
    )
    assert result.reward_before < 0.3
    assert result.reward_after > result.reward_before + 0.1
    assert result.accuracy_after is None
    shown = capsys.readouterr().out
    assert re.search(r"step 0 of 40: test loss \S+, reward [\d.]+\n", shown)
    assert re.search(r"step 40 of 40: loss \S+, reward [\d.]+, learning rate", shown)


def test_grpo_s_divergence_is_measured_from_the_start(tokenizer, tmp_path):
    """It is 0 in the first step, and TRL's function that loads models is itself again."""
    from trl.trainer import grpo_trainer

    load = grpo_trainer.create_model_from_path
    model = qrefta.prepare(tiny_llama(), rank=48, progress=False)
    kind = combined(StartsAsReference, trl.GRPOTrainer)
    trainer = kind(
        model=model,
        args=training_arguments(
            "grpo",
            tmp_path / "out",
            beta=0.1,
            max_steps=4,
            learning_rate=3e-2,
            logging_steps=1,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=4,
            disable_tqdm=True,
            save_strategy="no",
        ),
        reward_funcs=[lambda completions, **_: [float(len(text)) for text in completions]],
        train_dataset=Dataset.from_list([{"prompt": "what is sky"}] * 16),
        processing_class=tokenizer,
    )
    trainer.train()
    assert grpo_trainer.create_model_from_path is load
    divergences = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 1e-4


@pytest.mark.parametrize("name", ["sync_ref_model", "fsdp"])
def test_what_the_shared_reference_cannot_do_is_refused(name, tokenizer, tmp_path):
    args = trl.DPOConfig(tmp_path, use_cpu=True, bf16=False)
    setattr(args, name, True)
    model = qrefta.prepare(tiny_llama(), rank=8, progress=False)
    with pytest.raises(ValueError, match=f"{name} is set, and the reference shares"):
        combined(StartsAsReference, trl.DPOTrainer)(model=model, args=args)


def test_broken_turns_of_prompts_in_a_file_are_refused(tmp_path):
    """Turns with different keys were taken as read."""
    rows = [{"prompt": QUESTION}, {"prompt": [{"role": "what", "content": 3, "weight": 1}]}]
    with pytest.raises(ValueError, match=r"row 2, column prompt, turn 1"):
        load_prompts(write_rows(tmp_path / "prompts.jsonl", rows * 3), 0)


def test_rewards_come_from_files(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(REWARD)
    function = load_reward(f"{file}:blue")
    assert function([], [ANSWER, WORSE], wanted=["blue", "blue"]) == [0.25, 0]
    assert load_reward(function) is function
    for text, message in [
        (f"{file}:red", "has no function 'red'; it has blue"),
        (str(file), "give a Python file that exists and the name of a function"),
        (f"{tmp_path}/other.py:blue", "give a Python file that exists"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_reward(text)


def test_grpo_needs_a_reward_and_no_other_task_takes_one(tokenizer, tmp_path):
    """Refused before the data are read."""
    for task, reward, message in [
        ("grpo", (), "needs a reward; give a function, or a file"),
        ("dpo", len, "reward is for the task grpo; the task is 'dpo'"),
    ]:
        with pytest.raises(ValueError, match=message):
            qrefta.finetune(tiny_llama(), tokenizer, "none", tmp_path, task=task, reward=reward)


@pytest.mark.parametrize(("task", "load"), [("dpo", load_preferences), ("grpo", load_prompts)])
def test_preferences_are_calibrated_on_as_conversations(task, load, tokenizer, tmp_path):
    data = load(write_rows(tmp_path / "pairs.jsonl", pair_rows(20)), 0)
    batches = task_batches(task, tiny_llama(), tokenizer, data, max_length=16)
    lines = {tokenizer.decode(ids, skip_special_tokens=True) for ids in batches[0]["input_ids"]}
    answers = (" blue", " red") if task == "dpo" else ("", "")
    assert lines == {
        f"user : what is {thing}? assistant :{answer}".replace("?", " ?")
        for thing, answer in zip(("sky", "blood"), answers)
    }


def test_prompts_are_not_cut_to_the_length_of_answers_in_calibration(tokenizer):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "what is " * 9}]}] * 2)
    (batch,) = task_batches(
        "grpo", tiny_llama(), tokenizer, DatasetDict(train=rows, test=rows), max_length=4
    )
    assert batch["input_ids"].shape[1] == len(token_ids(rows[0], tokenizer, answer=False)) > 18


def rewarded(tokenizer, reward):
    """The reward of a run on two prompts with a column of answers."""
    rows = Dataset.from_list([{"prompt": QUESTION, "answer": "blue"}] * 2)
    data = DatasetDict(train=rows, test=rows)
    recipe = TASKS["grpo"].recipe(tiny_llama(), tokenizer, data, 4, rewards=[reward])
    return recipe.options["reward_funcs"][0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions: [1.0], r"does not take .*'prompts'.*\(completions, \*\*columns\)"),
        (lambda completions, wanted, **_: [1.0], "does not take .*'wanted'"),
    ],
)
def test_a_reward_that_does_not_take_the_columns_is_refused(reward, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        rewarded(tokenizer, reward)


@pytest.mark.parametrize(
    ("values", "shown"), [(0.5, "0.5"), ([1.0], r"\[1.0\]"), ("ab", "'ab'"), (None, "None")]
)
def test_a_reward_that_returns_no_list_of_numbers_is_refused(values, shown, tokenizer):
    function = rewarded(tokenizer, lambda completions, **_: values)
    message = f"returned {shown}; it must return a list of 2 numbers"
    with pytest.raises(ValueError, match=message):
        function(prompts=["a", "a"], completions=["b", "c"])


def test_a_reward_may_leave_a_completion_out(tokenizer):
    function = rewarded(tokenizer, lambda completions, **_: [torch.tensor(0.5), None])
    assert function(prompts=["a", "a"], completions=["b", "c"]) == [0.5, None]


@pytest.mark.parametrize("task", ["dpo", "grpo"])
def test_a_prompt_that_the_template_does_not_take_is_named(task, tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    rows = pair_rows(3)
    rows[2]["prompt"] = [{"role": "system", "content": "red"}, *QUESTION]
    data = DatasetDict(train=Dataset.from_list(rows[:2]), test=Dataset.from_list(rows))
    options = {"rewards": [len]} if task == "grpo" else {}
    message = r"The test split, row 3: the chat template does not take .*: no system role\. Change"
    with pytest.raises(ValueError, match=message):
        TASKS[task].recipe(tiny_llama(), tokenizer, data, 32, **options)
    data = DatasetDict(train=Dataset.from_list(rows))
    with pytest.raises(ValueError, match=r"A row of the train split: .*: no system role"):
        task_batches(task, tiny_llama(), tokenizer, data, max_length=32)


def test_rows_of_a_step_that_are_no_groups_of_answers_are_refused(tokenizer, tmp_path):
    """By the names of `finetune`, before the data are read; TRL names its own fields."""
    options = {"task": "grpo", "reward": len}
    message = re.escape("(--batch-size) 6 x gradient_accumulation (--gradient-accumulation) 1")
    with pytest.raises(ValueError, match=f"has 6 rows: batch_size {message}.*num_generations"):
        qrefta.finetune(tiny_llama(), tokenizer, "x", tmp_path, batch_size=6, **options)
    args = training_arguments("grpo", tmp_path, num_generations=3, per_device_train_batch_size=6)
    assert args.num_generations == 3


def test_a_setting_of_another_task_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="beta is for the task dpo or grpo; the task is 'sft'"):
        qrefta.finetune(tiny_llama(), tokenizer, "x", tmp_path, task="sft", beta=0.1)
    model = copy.deepcopy(tiny_llama())
    with pytest.raises(ValueError, match="num_generations is for the task grpo"):
        qrefta.finetune(model, tokenizer, "x", tmp_path, task="dpo", num_generations=4)
