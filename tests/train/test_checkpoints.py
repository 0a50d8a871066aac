"""Checkpoints are whole or not there, at whatever file a run stops."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, TrainingArguments

from qrefta.train import checkpoints
from qrefta.train.checkpoints import UNFINISHED, WholeCheckpoints, last_checkpoint, publish
from tests.models import prepared, tiny_bert

IDS = torch.tensor([2, 3, 4, 5])
ROWS = [{"input_ids": IDS, "labels": torch.tensor(index % 2)} for index in range(8)]


class Killed(BaseException):
    """Ends a run as a signal does: nothing catches it."""


def trainer(folder, **settings):
    model = prepared(tiny_bert, rank=4, refine=0)
    settings = {"max_steps": 4, "save_steps": 1} | settings
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return WholeCheckpoints(model, arguments, train_dataset=ROWS)


@pytest.mark.slow
def test_checkpoints_are_where_trainer_puts_them_and_no_more_than_asked(tmp_path):
    trainer(tmp_path).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("written", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_run_that_ends_within_a_save_leaves_the_checkpoint_before(tmp_path, monkeypatch, written):
    run = trainer(tmp_path)

    def ends(*_):
        if run.state.global_step == 3:
            raise Killed

    monkeypatch.setattr(run, written, ends)
    with pytest.raises(Killed):
        run.train()
    assert (tmp_path / UNFINISHED / "checkpoint-3" / "model.safetensors").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-3").exists()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.slow
def test_files_are_on_the_disk_before_they_get_their_place(tmp_path, monkeypatch):
    """Every file is synced, and then its folder, before the rename; the run's folder after it."""
    done = []
    sync = os.fsync
    rename = Path.rename

    def noted_sync(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def noted_rename(path, target):
        files = {file for file in path.rglob("*") if file.is_file()} | {path}
        assert files <= set(done)
        done.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    trainer(tmp_path, max_steps=1).train()
    assert done == [tmp_path]


def test_a_checkpoint_of_an_earlier_run_is_replaced(tmp_path):
    old = tmp_path / "checkpoint-1"
    old.mkdir()
    (old / "stale.txt").write_text("old")
    trainer(tmp_path, max_steps=1).train()
    assert not (old / "stale.txt").exists()
    assert (old / "trainer_state.json").exists()
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    save = run._save_optimizer_and_scheduler

    def full(folder):
        if run.state.global_step == 3:
            raise OSError(28, "No space left on device")
        save(folder)

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", full)
    message = r"the checkpoint of step 3 to .*No space left on device.*whole; make room"
    with pytest.raises(OSError, match=message):
        run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("text", ["CUDA error", "writev [127.0.0.1]:1: Broken pipe"])
def test_errors_unrelated_to_writing_are_raised_unchanged(tmp_path, monkeypatch, text):
    run = trainer(tmp_path)

    def fail(_):
        raise RuntimeError(text)

    monkeypatch.setattr(run, "_save_rng_state", fail)
    with pytest.raises(RuntimeError, match=re.escape(text)):
        run.train()


@pytest.mark.parametrize("numbers", [10, 10_000_000])
def test_torch_save_on_a_full_disk_is_told_as_one(tmp_path, monkeypatch, numbers):
    """Its errors for few and for many bytes are of two kinds."""
    run = trainer(tmp_path)

    def fill(_):
        torch.save(torch.zeros(numbers), "/dev/full")

    monkeypatch.setattr(run, "_save_rng_state", fill)
    with pytest.raises(OSError, match="Cannot write the checkpoint of step 1 "):
        run.train()


def saved(folder, layers, **options):
    tiny_bert(layers=layers).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize(("old", "new"), [("20KB", "1GB"), ("1GB", "20KB")])
def test_a_model_takes_the_place_of_an_older_one_of_more_or_fewer_files(tmp_path, old, new):
    run = saved(tmp_path / "run", 2, max_shard_size=old)
    publish(saved(run / UNFINISHED, 3, max_shard_size=new), run)
    expected = tiny_bert(layers=3).base_model
    loaded = AutoModel.from_pretrained(run)
    assert loaded.config.num_hidden_layers == 3
    pairs = zip(expected.named_parameters(), loaded.parameters(), strict=True)
    for (name, parameter), other in pairs:
        assert torch.equal(parameter, other), name
    assert not (run / UNFINISHED).exists()


def test_between_two_models_there_is_none(tmp_path, monkeypatch):
    """Stopped at any move, the run's folder holds the older model, none or the new model."""
    replace = Path.replace
    moves = []

    def ends(path, target):
        if len(moves) == after:
            raise Killed
        moves.append(path)
        return replace(path, target)

    monkeypatch.setattr(checkpoints.Path, "replace", ends)
    for after in range(3):
        moves.clear()
        run = saved(tmp_path / str(after), 2)
        new = saved(run / UNFINISHED, 3)
        if after >= len(list(new.iterdir())):
            break
        with pytest.raises(Killed):
            publish(new, run)
        assert not (run / "config.json").exists()
    assert after == 2


def test_a_models_files_are_on_the_disk_before_the_older_model_goes(tmp_path, monkeypatch):
    run = saved(tmp_path / "run", 2)
    new = saved(run / UNFINISHED, 3)
    files = set(new.iterdir())
    done = set()
    sync = os.fsync
    unlink = Path.unlink

    def noted_sync(descriptor):
        done.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def noted_unlink(path):
        assert files <= done
        unlink(path)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "unlink", noted_unlink)
    publish(new, run)
    assert not (run / UNFINISHED).exists()
