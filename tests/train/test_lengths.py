"""max_length, the positions of the model, and the tokenizer's limit, before a run starts."""

import json
import warnings

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    CanineTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PerceiverTokenizer,
    T5Tokenizer,
)
from typer.testing import CliRunner

import qrefta
from qrefta.cli import app
from qrefta.train.arguments import training_arguments
from qrefta.train.calibration import task_batches
from qrefta.train.lengths import row_length
from qrefta.train.tasks.chat import chat_recipe
from qrefta.train.tasks.classify import text_classes
from qrefta.train.tasks.dpo import dpo_recipe
from qrefta.train.tasks.grpo import grpo_recipe
from tests.models import build, decoder_sizes, tiny_bert, tiny_gpt2, tiny_llama
from tests.tiny import color_data, tiny_folder, tiny_tokenizer
from tests.train.talk import chat_rows, pair_rows, words, write_rows


def test_the_default_is_lowered_to_the_positions():
    tokenizer = tiny_tokenizer()
    assert row_length(tiny_bert(), tokenizer, None) == 64
    assert row_length(tiny_llama(), tokenizer, None) == 64
    assert row_length(tiny_bert(), tokenizer, 64) == 64


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "8"])
def test_a_length_that_is_no_count_is_refused(length):
    with pytest.raises(ValueError, match="it must be a number of tokens, 1 or more"):
        row_length(tiny_bert(), tiny_tokenizer(), length)


def test_lengths_that_the_model_was_not_made_for_are_warned_of():
    tokenizer = tiny_tokenizer()
    with pytest.warns(UserWarning, match="max_length is 65, and LlamaForCausalLM was trained on"):
        assert row_length(tiny_llama(), tokenizer, 65) == 65
    tokenizer.model_max_length = 32
    with pytest.warns(UserWarning, match="the tokenizer is made for 32"):
        assert row_length(tiny_llama(), tokenizer, 64) == 64


def test_a_tokenizer_without_words_is_refused(tmp_path):
    """transformers makes one for a folder without tokenizer files; all words were [UNK]."""
    folder = tiny_folder(tmp_path / "model")
    for file in folder.glob("*token*"):
        file.unlink()
    rows = source_of("classify", tmp_path)
    command = ["finetune", str(folder), str(rows), str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"no tokenizer files.*save_pretrained"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    model = qrefta.prepare(tiny_bert(), rank=4)
    message = rf"BertTokenizer of '{folder}'.* has no words.*save_pretrained"
    with pytest.raises(ValueError, match=message):
        qrefta.finetune(model, AutoTokenizer.from_pretrained(folder), rows, tmp_path / "out")


@pytest.mark.parametrize("kind", [GPT2Tokenizer, T5Tokenizer])
def test_other_tokenizers_without_words_are_refused(kind):
    """An empty one of T5 holds the mark of a space, too."""
    with pytest.raises(ValueError, match="has no words"):
        row_length(tiny_bert(), kind(), None)


@pytest.mark.parametrize("kind", [ByT5Tokenizer, CanineTokenizer, PerceiverTokenizer])
def test_tokenizers_of_bytes_and_letters_are_taken(kind):
    assert row_length(tiny_bert(), kind(), None) == 64


TASKS = ["classify", "lm", "sft", "dpo", "grpo"]


def source_of(task, folder):
    """A file for a task, and a model with 64 learned positions."""
    file = folder / "rows.jsonl"
    if task == "classify":
        rows = [{"text": "red", "label": "a"}, {"text": "blue", "label": "b"}] * 10
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file
    rows = {"lm": [{"text": "what is sky ? " * 30}] * 20, "sft": chat_rows(20)}
    return write_rows(file, rows.get(task) or pair_rows(20))


def no_reward(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize("task", TASKS)
def test_a_length_beyond_the_positions_is_refused_before_the_run(task, tmp_path):
    if task in ("sft", "dpo", "grpo"):
        pytest.importorskip("trl")
    model = tiny_bert() if task == "classify" else tiny_gpt2()
    model.config.num_labels = 2
    tokenizer = tiny_tokenizer() if task == "classify" else words()
    model = qrefta.prepare(model, rank=2, progress=False)
    source = source_of(task, tmp_path)
    reward = {"reward": no_reward} if task == "grpo" else {}
    message = r"max_length is 65, and \w+ has 64 positions; give max_length=64 \(--max-length 64\)"
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        qrefta.finetune(
            model, tokenizer, source, out, task=task, max_length=65, progress=False, **reward
        )
    if task in ("sft", "dpo", "grpo"):
        args = training_arguments(task, out)  # of 128 tokens
        with pytest.raises(ValueError, match="max_length is 128, and"):
            qrefta.finetune(model, tokenizer, source, task=task, args=args, **reward)
    assert not out.exists()


@pytest.mark.parametrize("calibration", ["data", "none"])
def test_the_command_refuses_before_it_prepares(calibration, tmp_path):
    paths = [tiny_folder(tmp_path / "dense"), source_of("classify", tmp_path), tmp_path / "out"]
    words = ["finetune", *map(str, paths), "--max-length", "65", "--calibration", calibration]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ValueError)
    assert "give max_length=64 (--max-length 64)" in str(result.exception)
    assert not paths[2].exists()


def told(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(row.message) for row in caught]


@pytest.mark.parametrize("pairs", [False, True])
def test_texts_that_are_cut_are_counted(pairs):
    """A text that just fits is whole."""
    columns = {"text": ["red"] * 3 + ["red " * 4] * 3 + ["red " * 5] * 3, "label": [0] * 9}
    if pairs:
        columns["text_pair"] = ["blue"] * 9
    part = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["a", "b"]))
    data = DatasetDict(train=part, test=part.select(range(6)))
    model = tiny_bert()
    model.config.num_labels = 2
    length = 5 if pairs else 4
    (message,) = told(lambda: text_classes(model, tiny_tokenizer(), data, length))
    assert message.startswith(f"3 of 9 rows of the train split have more than {length} tokens")
    assert told(lambda: task_batches("classify", model, tiny_tokenizer(), data, max_length=2)) == []


def test_conversations_that_are_cut_are_counted():
    pytest.importorskip("trl")
    rows = chat_rows(4)
    rows[0]["messages"][1]["content"] = "blue " * 20
    data = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[1:]))
    (message,) = told(lambda: chat_recipe(tiny_llama(), words(), data, 16))
    assert message.startswith("1 of 4 rows of the train split have more than 16 tokens")
    recipe = chat_recipe(tiny_llama(), words(), data, 16)
    assert set(recipe.train.column_names) == {"input_ids", "labels"}


def test_rows_that_are_not_cut_must_fit():
    """With max_length=None, and for prompts with their answers."""
    pytest.importorskip("trl")
    rows = chat_rows(4)
    rows[2]["messages"][1]["content"] = "blue " * 80
    chats = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:2]))
    message = r"1 of 4 rows \(of the train split\) have more than the 64 positions of GPT2LMHead"
    with pytest.raises(ValueError, match=message + r".*row 3 has \d\d tokens"):
        chat_recipe(tiny_gpt2(), words(), chats, None)
    pairs = pair_rows(4)
    prompts = DatasetDict({name: Dataset.from_list(pairs) for name in ("train", "test")})
    with pytest.raises(ValueError, match=r"4 of 4 rows .* have more than the 64 positions"):
        grpo_recipe(
            tiny_gpt2(),
            words(),
            prompts,
            60,
            rewards=[lambda completions, **_: [*map(len, completions)]],
        )
    grpo_recipe(
        tiny_gpt2(),
        words(),
        prompts,
        16,
        rewards=[lambda completions, **_: [*map(len, completions)]],
    )
    pairs[2]["rejected"][0]["content"] = "blue " * 80
    long = DatasetDict({name: Dataset.from_list(pairs) for name in ("train", "test")})
    with pytest.raises(ValueError, match=message):
        dpo_recipe(tiny_gpt2(), words(), long, None)


def test_a_default_length_trains_a_model_with_fewer_positions(tmp_path):
    model = tiny_bert()
    model.config.num_labels = 2
    model = qrefta.prepare(model, rank=2, progress=False)
    data = color_data(8, 8)
    assert all(len(ids) <= 64 for ids in task_batches("classify", model, tiny_tokenizer(), data))
    result = qrefta.finetune(model, tiny_tokenizer(), data, tmp_path, max_steps=1, progress=False)
    assert result.steps == 1


@pytest.mark.parametrize("task", ["classify", "lm", "sft", "dpo", "grpo"])
def test_a_token_that_was_added_to_the_tokenizer_alone_is_refused_before_the_run(task, tmp_path):
    """The model would fail with "index out of range in self"."""
    tokenizer = words()
    model = build_of(task, len(tokenizer))
    tokenizer.add_tokens(["green"])
    data, shown = rows_with("green", task, tmp_path)
    tuned = [model, tokenizer, data, tmp_path / "run"]
    options = {"reward": lambda prompts, **columns: [0.0] * len(prompts)} if task == "grpo" else {}
    with pytest.raises(ValueError, match=rf"has the token {shown}.*resize_token_embeddings"):
        qrefta.finetune(*tuned, task=task, max_steps=1, max_length=16, progress=False, **options)


def build_of(task, vocabulary):
    config = LlamaConfig(**decoder_sizes(32) | {"vocab_size": vocabulary, "pad_token_id": 1})
    kind = LlamaForSequenceClassification if task == "classify" else LlamaForCausalLM
    return qrefta.prepare(build(kind, config), rank=4, progress=False)


def rows_with(word, task, folder):
    """Data whose last word is new, and the number and text of its token."""
    shown = rf"{len(words())} \('{word}'\)"
    if task == "classify":
        names = ClassLabel(names=["a", "b"])
        text = ["sky is", "blood is"] * 10 + [f"sky is {word}"]
        rows = Dataset.from_dict({"text": text, "label": [0, 1] * 10 + [0]})
        rows = rows.cast_column("label", names)
        return DatasetDict({"train": rows, "test": rows}), shown
    if task == "lm":
        file = folder / "text.txt"
        file.write_text("sky is blue " * 200 + f"{word} " + "sky is blue " * 200)
        return file, shown
    if task in ("dpo", "grpo"):
        pairs = pair_rows(20)
        turns = pairs[3]["rejected" if task == "dpo" else "prompt"]
        turns[0]["content"] = word
        return write_rows(folder / "pairs.jsonl", pairs), shown
    rows = chat_rows(20)
    rows[3]["messages"][1]["content"] = word
    return write_rows(folder / "chat.jsonl", rows), shown
