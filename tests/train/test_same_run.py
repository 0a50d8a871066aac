"""A run resumes with the model, data and settings of its checkpoint, or is refused."""

import copy
import json
import shutil

import pytest
import torch
from datasets import DatasetDict
from torch.testing import assert_close

import qrefta
from qrefta.files.folders import LOCK, held
from qrefta.train.arguments import training_arguments
from qrefta.train.checkpoints import UNFINISHED, last_checkpoint
from qrefta.train.finetune import finetune
from qrefta.train.models import load_classifier
from qrefta.train.same_run import MARKS
from tests.tiny import color_data, tiny_folder, tiny_tokenizer
from tests.train.test_progress import Interrupt


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    return load_classifier(str(folder), ["red", "blue"], seed=0)


@pytest.fixture
def train(dense, tmp_path):
    def run(name="run", data=None, method="refta", callbacks=(), resume=False, **settings):
        model = qrefta.prepare(copy.deepcopy(dense), rank=8, method=method, refine=0)
        keywords = {
            key: settings.pop(key) for key in ("early_stopping", "eval_steps") if key in settings
        }
        settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-3} | settings
        args = training_arguments("classify", tmp_path / name, disable_tqdm=True, **settings)
        result = finetune(
            model,
            tiny_tokenizer(),
            data or color_data(),
            args=args,
            callbacks=callbacks,
            resume=resume,
            **keywords,
        )
        return model, result

    return run


@pytest.fixture
def stopped(train, tmp_path):
    """The folder of a run that was stopped in its fifth step of eight."""
    with pytest.raises(KeyboardInterrupt):
        train(max_steps=8, callbacks=[Interrupt(5)])
    return tmp_path / "run"


def other_rows():
    data = color_data()
    return DatasetDict(train=data["train"].select(range(8, 96)), test=data["test"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": other_rows()}, r"other data.*training rows 96 -> 88; first training rows"),
        ({"seed": 7}, "another seed.*seed 0 -> 7"),
        ({"method": "lorta"}, "another model.*method refta -> lorta"),
    ],
    ids=str,
)
def test_another_run_is_refused_and_the_checkpoint_stays(changed, message, train, stopped):
    with pytest.raises(ValueError, match=message):
        train(max_steps=8, resume=True, **changed)
    assert last_checkpoint(stopped).name == "checkpoint-5"


@pytest.mark.slow
def test_another_batch_size_and_a_checkpoint_without_marks_are_taken(train, stopped):
    (stopped / "checkpoint-5" / MARKS).unlink()
    _, result = train(max_steps=8, resume=True, per_device_train_batch_size=16, seed=7)
    assert result.steps == 8


@pytest.mark.slow
def test_early_stopping_goes_on_where_it_was(train, tmp_path):
    """At a rate of nearly zero no evaluation is better than the first."""
    settings = {"max_steps": 40, "early_stopping": 2, "eval_steps": 4, "save_steps": 4}
    settings |= {"learning_rate": 1e-30}
    _, whole = train("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[Interrupt(6)], **settings)
    _, resumed = train(resume=True, **settings)
    assert resumed.steps == whole.steps == 12
    logs = [
        json.loads((last_checkpoint(tmp_path / name) / "trainer_state.json").read_text())
        for name in ("whole", "run")
    ]
    evaluated = [[row["step"] for row in log["log_history"] if "eval_loss" in row] for log in logs]
    assert evaluated[0] == evaluated[1]


@pytest.mark.slow
def test_a_folder_that_another_process_trains_into_is_refused(train, tmp_path):
    """Its unfinished checkpoint would be removed."""
    unfinished = tmp_path / "run" / UNFINISHED / "checkpoint-5"
    unfinished.mkdir(parents=True)
    with held(tmp_path / "run"):
        with pytest.raises(ValueError, match=r"Another process is writing to .*run and holds"):
            train(max_steps=2)
        assert unfinished.exists()
    train(max_steps=2)
    assert not (tmp_path / "run" / LOCK).exists()


def test_files_of_the_user_stay_in_the_folder(train, tmp_path):
    moments = tmp_path / "run" / "moments.safetensors"
    moments.parent.mkdir()
    moments.write_bytes(b"mine")
    train(max_steps=2)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2.bak")
    train(max_steps=4, resume=True)
    assert moments.read_bytes() == b"mine"
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_model_keeps_its_forward_pass(train):
    model, _ = train(max_steps=2, bf16=True)
    assert "forward" not in vars(model)
    assert "_original_forward" not in vars(model)
    again = copy.deepcopy(model).eval()
    ids = torch.arange(2, 8).view(1, 6)
    before = model.eval()(ids).logits
    assert before.dtype == torch.float32
    with torch.no_grad():
        for parameter in again.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert (again(ids).logits - before).abs().max() > 1e-3  # computed with its own weights
    assert_close(model(ids).logits, before)
