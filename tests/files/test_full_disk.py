"""Disks that are full or read-only: a clear error, files that were there stay whole, nothing
half-done stays.

On a small file system in memory, mounted for the test; skipped where that is not allowed.
"""

import hashlib
import os
import subprocess

import pytest
from transformers import AutoTokenizer

import qrefta
from qrefta.train.arguments import training_arguments
from qrefta.train.checkpoints import last_checkpoint
from qrefta.train.finetune import finetune
from qrefta.train.models import load_classifier
from tests.models import tiny_bert
from tests.tiny import color_data, tiny_folder

FREE = 200_000  # bytes that are left, less than any of the models takes


@pytest.fixture
def disk(tmp_path):
    """An empty file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True
    )
    if made.returncode:
        pytest.skip("no file system can be mounted")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("dense"), width=128)


def fill(disk, free=FREE):
    """Leave `free` bytes."""
    state = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * max(state.f_bavail * state.f_frsize - free, 0))


def make_read_only(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "filler"
    }


@pytest.mark.parametrize("spoil", [fill, make_read_only])
def test_checkpoints_and_the_model_of_a_run_stay_whole(disk, dense, spoil):
    """The run of before loads and can be gone on with, once there is room."""
    model = qrefta.prepare(
        load_classifier(str(dense), ["red", "blue"], seed=0), rank=8, refine=0, progress=False
    )
    tokenizer, out = AutoTokenizer.from_pretrained(dense), disk / "run"
    settings = {"save_steps": 1, "disable_tqdm": True}
    args = training_arguments("classify", out, max_steps=1, **settings)
    finetune(model, tokenizer, color_data(), args=args)
    before = files(out)
    spoil(disk)
    args = training_arguments("classify", out, max_steps=2, **settings)
    full = "Cannot write the checkpoint of step 2 .*No space left"
    with pytest.raises(OSError, match=rf"{full}|cannot write to .*/run: Read-only.*write access"):
        finetune(model, tokenizer, color_data(), args=args, resume=True)
    assert files(out) == before
    assert last_checkpoint(out) == out / "checkpoint-1"
    qrefta.load(out)


@pytest.mark.parametrize("spoil", [fill, make_read_only])
def test_a_new_folder_is_complete_or_absent(disk, dense, spoil, tmp_path):
    """Merged, exported as a LoRA, prepared out of core."""
    model = qrefta.prepare(tiny_bert(hidden=256), rank=8, refine=0, progress=False)
    (disk / "kept").write_text("kept")
    tiny_bert(hidden=256).save_pretrained(tmp_path / "dense")
    spoil(disk)
    writes = {
        "merged": lambda out: qrefta.merge(model, out=out),
        "lora": lambda out: qrefta.export_lora(model, out),
        "prepared": lambda out: qrefta.prepare_checkpoint(
            tmp_path / "dense", out, rank=8, refine=0, progress=False
        ),
    }
    for name, write in writes.items():
        with pytest.raises(OSError, match=r"No space left|Read-only"):
            write(disk / name)
        assert not (disk / name / "config.json").exists(), name
    assert {path.name for path in disk.iterdir()} <= {"kept", "filler", "prepared"}
    assert (disk / "kept").read_text() == "kept"


def test_preparing_goes_on_once_there_is_room(disk, tmp_path):
    """Stacks written before the disk was full are not computed again; the result is the same."""
    tiny_bert(hidden=256).save_pretrained(tmp_path / "dense")
    settings = {"rank": 8, "refine": 0, "progress": False}
    qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "whole", **settings)
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        qrefta.prepare_checkpoint(tmp_path / "dense", disk / "out", **settings)
    (disk / "filler").unlink()
    qrefta.prepare_checkpoint(tmp_path / "dense", disk / "out", **settings)
    whole, again = files(tmp_path / "whole"), files(disk / "out")
    assert {name: again[name] for name in whole if name != "README.md"} == {
        name: digest for name, digest in whole.items() if name != "README.md"
    }
