"""The recipe: learns, resumes bit for bit, leaves compact factors, and says what does not fit."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer, Trainer

import qrefta
from qrefta.nn.factors import BANK
from qrefta.train.finetune import count_trained, finetune
from qrefta.train.models import load_classifier
from tests.tiny import color_data, color_rows, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def prepared(folder):
    return qrefta.prepare(load_classifier(str(folder), ["red", "blue"], seed=0), rank=8)


def run(folder, out, **options):
    model = prepared(folder)
    options = {"learning_rate": 1e-2, "batch_size": 16, "progress": False} | options
    return model, finetune(
        model, AutoTokenizer.from_pretrained(folder), color_data(), out, **options
    )


def test_training_learns_the_task_and_the_saved_model_keeps_it(folder, tmp_path):
    model, result = run(folder, tmp_path, epochs=8)
    assert result.accuracy_after > max(0.9, result.accuracy_before)
    assert result.steps == 48
    sizes = 3 * [(32, 32)] + [(32, 32), (64, 32), (32, 64)]
    assert (
        result.trained_parameters == 8 * sum(map(sum, sizes)) + 2 * 32 + 2 == count_trained(model)
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer([row["text"] for row in color_rows(4, seed=3)], return_tensors="pt")
    with torch.no_grad():
        assert_close(
            qrefta.load(tmp_path)(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=0
        )


def test_only_factors_and_head_move(folder, tmp_path):
    before = {name: tensor.clone() for name, tensor in prepared(folder).state_dict().items()}
    model, _ = run(folder, tmp_path, max_steps=2)
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trained
    assert all(name.startswith((BANK, "classifier")) for name in trained)


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(folder, tmp_path, monkeypatch):
    whole, uninterrupted = run(folder, tmp_path / "whole", max_steps=8, save_steps=4)
    step = Trainer.training_step

    def stop_after_five(trainer, *arguments, **options):
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "cut", max_steps=8, save_steps=4)
    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "training_step",
            lambda *args, **options: counted.append(1) or step(*args, **options),
        )
        resumed, result = run(folder, tmp_path / "cut", max_steps=8, save_steps=4, resume=True)
    assert result.steps == 8
    assert result.test_loss_before == uninterrupted.test_loss_before
    assert len(counted) == 4  # from checkpoint-4 on
    for (name, expected), actual in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(actual, expected), name


def test_final_model_stores_bf16_factors_and_checkpoints_their_masters(folder, tmp_path):
    run(folder, tmp_path, max_steps=4, save_steps=2)
    final = load_file(tmp_path / "model.safetensors")
    checkpoint = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    factors = [name for name in final if name.startswith(BANK) and name.endswith((".A", ".B"))]
    assert factors
    assert {final[name].dtype for name in factors} == {torch.bfloat16}
    assert {checkpoint[name].dtype for name in factors} == {torch.float32}


def test_model_and_data_that_do_not_fit_are_refused(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    three = qrefta.prepare(load_classifier(str(folder), ["a", "b", "c"], seed=0), rank=8)
    with pytest.raises(ValueError, match="3 labels and the data 2 classes"):
        finetune(three, tokenizer, color_data(), tmp_path)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        finetune(prepared(folder), tokenizer, color_data(), tmp_path, resume=True)
    (tmp_path / "before" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "before" / "checkpoint-7" / "trainer_state.json").touch()
    with pytest.raises(ValueError, match="before holds checkpoint-7 of an earlier run"):
        finetune(prepared(folder), tokenizer, color_data(), tmp_path / "before")
    raw = color_data()
    raw["train"] = raw["train"].cast_column("label", raw["train"].features["text"])
    with pytest.raises(ValueError, match="no ClassLabel"):
        finetune(prepared(folder), tokenizer, raw, tmp_path)
