"""Calibration on the rows of a task: as many as the budget allows, processed as for training."""

import json

import pytest
import torch
from transformers import ViTImageProcessor

from qrefta.model.stacks import find_stacks
from qrefta.split.calibrate import gather_moments
from qrefta.train import calibration
from qrefta.train.arguments import training_arguments
from qrefta.train.calibration import task_batches
from qrefta.train.data import load_classification
from qrefta.train.tasks import load_chat, load_images, load_text
from qrefta.train.tasks.chat import chat_recipe
from qrefta.train.tasks.classify import text_classes
from qrefta.train.tasks.image import image_classes
from qrefta.train.tasks.lm import text_windows
from tests.models import tiny_bert, tiny_llama, tiny_vit
from tests.tiny import color_rows, tiny_tokenizer
from tests.train.talk import chat_rows
from tests.train.test_tasks import pictures  # noqa: F401 (a fixture)


def tiny_classifier():
    model = tiny_bert()
    model.config.num_labels = 2
    return model


def sequences(batches):
    """The rows of all batches without their padding, in order of their tokens."""
    rows = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        rows += [ids[kept.bool()].tolist() for ids, kept in zip(batch["input_ids"], mask)]
    return sorted(rows)


@pytest.fixture
def reviews(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in color_rows(60, seed=1)))
    return load_classification(file)


def test_classification_rows_are_those_of_the_recipe(reviews):
    model = tiny_classifier()
    batches = task_batches("classify", model, tiny_tokenizer(), reviews, max_length=5)
    recipe = text_classes(model, tiny_tokenizer(), reviews, 5)
    assert sequences(batches) == sorted(recipe.train["input_ids"])
    assert max(batch["input_ids"].shape[1] for batch in batches) == 5


def test_rows_are_chosen_by_seed_and_stop_at_the_tokens(reviews, monkeypatch):
    model = tiny_classifier()
    monkeypatch.setattr(calibration, "ROWS", 10)
    one, same, other = (
        sequences(task_batches("classify", model, tiny_tokenizer(), reviews, seed=seed))
        for seed in (0, 0, 1)
    )
    assert one == same != other
    assert len(one) == 10
    monkeypatch.setattr(calibration, "TOKENS", 30)
    few = sequences(task_batches("classify", model, tiny_tokenizer(), reviews))
    assert 1 <= len(few) < 10
    assert sum(map(len, few)) <= 30


def test_running_text_is_cut_as_for_training(tmp_path):
    """The windows to test on, the tail of the file, are not calibrated on."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(row["text"] for row in color_rows(60, seed=1)))
    data = load_text(file, 0)
    model = tiny_llama()
    batches = task_batches("lm", model, tiny_tokenizer(), data, max_length=8)
    recipe = text_windows(model, tiny_tokenizer(), data, 8)
    assert sequences(batches) == sorted(recipe.train["input_ids"])


@pytest.mark.parametrize("plain", [False, True])
def test_conversations_are_the_tokens_of_trl(plain, tokenizer, tmp_path):
    rows = chat_rows(6)
    for row in rows:
        row["messages"][1]["content"] += " red sky"  # is cut
    if plain:
        rows = [{"prompt": "what is sky ?", "completion": f" {x}"} for x in ("blue", "red")] * 3
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_chat(file, seed=0)
    model = tiny_llama()
    found = sequences(task_batches("sft", model, tokenizer, data, max_length=10))
    recipe = chat_recipe(model, tokenizer, data, 10)
    trainer = recipe.trainer(
        model=model,
        args=training_arguments("sft", tmp_path / "out", max_length=10),
        train_dataset=recipe.train,
        processing_class=tokenizer,
    )
    assert found == sorted(trainer.train_dataset["input_ids"])


def test_images_go_through_the_collator_of_the_task(pictures, monkeypatch):  # noqa: F811
    model = tiny_vit()
    model.config.num_labels = 2
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    data = load_images(pictures, 0)
    monkeypatch.setattr(calibration, "IMAGES", 20)
    batches = task_batches("image", model, processor, data)
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [
        (16, 3, 16, 16),
        (4, 3, 16, 16),
    ]
    recipe = image_classes(model, processor, data)
    known = {tuple(row["pixel_values"].flatten().tolist()) for row in recipe.train}
    found = [tuple(x.flatten().tolist()) for batch in batches for x in batch["pixel_values"]]
    assert set(found) <= known
    moments = gather_moments(model, find_stacks(model), batches, progress=False)
    assert min(moments.tokens.values()) >= 20
