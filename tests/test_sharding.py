"""Shards of a model: their memory, and back to one folder."""

import multiprocessing
import shutil
import sys
from multiprocessing import forkserver

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

import qrefta
from qrefta.cli import app
from qrefta.files.on_disk import empty_on_disk
from tests.processes import torchrun
from tests.shards import (
    LARGE,
    LAYERS,
    TINY,
    by_accelerate,
    by_hand,
    consolidated,
    random_folder,
)

pytestmark = pytest.mark.slow

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The prepared models tiny and large, and the files of all processes."""
    multiprocessing.set_forkserver_preload(["tests.processes", "tests.shards"])
    forkserver.ensure_running()
    folder = tmp_path_factory.mktemp("shards")
    random_folder(folder / "tiny", **TINY)
    random_folder(folder / "large", **LARGE)
    torchrun(by_hand, folder, 2)
    torchrun(by_hand, folder, 4)
    torchrun(consolidated, folder, 1)
    torchrun(by_accelerate, folder, 2)
    return folder


def results(folder, way, processes):
    return [torch.load(folder / f"{way}-{rank}.pt") for rank in range(processes)]


def size(folder):
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@linux
@pytest.mark.parametrize(
    ("way", "processes"), [("by-hand-2", 2), ("by-hand-4", 4), ("accelerate", 2)]
)
def test_a_process_loads_its_share_and_holds_one_block_more_at_most(way, processes, folder):
    """70 MB in 12 blocks. Measured: the share and 1 to 3 MB."""
    whole = size(folder / "large")
    assert whole > 70_000_000
    for rank in results(folder, way, processes):
        assert rank.get("sharded", True)
        assert whole / processes < rank["loaded"] < whole / processes + whole / LAYERS


@linux
@pytest.mark.parametrize("processes", [2, 4])
def test_saving_a_sharded_model_adds_a_few_blocks_at_most(processes, folder):
    """The first process too: it keeps the gathered tensors on the disk."""
    whole = size(folder / "large")
    for rank in results(folder, f"by-hand-{processes}", processes):
        assert rank["saved"] < 3 * whole / LAYERS


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ["tiny", "large"])
def test_the_saved_folder_has_the_bytes_of_the_start_and_trained_factors(name, processes, folder):
    saved = load_file(folder / f"{name}-{processes}" / "whole" / "model.safetensors")
    start = load_file(folder / name / "model.safetensors")
    assert saved.keys() == start.keys()
    changed = {key for key in start if not torch.equal(saved[key].float(), start[key].float())}
    assert {key.rpartition(".")[2] for key in changed} == {"A", "B"}
    qrefta.verify(folder / f"{name}-{processes}" / "whole")


@pytest.mark.parametrize("name", ["tiny", "large"])
def test_a_sharded_checkpoint_becomes_the_folder_that_the_processes_save(name, folder):
    out = folder / f"{name}-4" / "out"
    saved = folder / f"{name}-4" / "whole"
    assert {path.name for path in out.iterdir()} == {path.name for path in saved.iterdir()}
    tensors = load_file(out / "model.safetensors")
    assert_close(tensors, load_file(saved / "model.safetensors"), rtol=0, atol=0)
    state = qrefta.load(out).state_dict()
    assert_close(state, qrefta.load(saved).state_dict(), rtol=0, atol=0)


@linux
def test_consolidating_holds_no_more_than_some_tensors(folder):
    """Measured: 8 MB of 71 MB; a tensor is 1 MB."""
    [peak] = torch.load(folder / "consolidated.pt")
    assert peak < size(folder / "large") / 4


def test_the_command_line_consolidates(folder, tmp_path):
    paths = [folder / "tiny-2" / "parts", folder / "tiny", tmp_path / "out"]
    result = CliRunner().invoke(app, ["consolidate", *map(str, paths)], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"MB in {tmp_path / 'out'}" in result.output.replace("\n", "")
    qrefta.verify(tmp_path / "out")


def test_a_checkpoint_of_another_model_is_refused_and_leaves_nothing(folder, tmp_path):
    parts = folder / "tiny-2" / "parts"
    with pytest.raises(ValueError, match=r"is .* in the base|has no tensor"):
        qrefta.consolidate(parts, folder / "large", tmp_path / "out")
    with pytest.raises(ValueError, match=r"is no sharded checkpoint.*\.metadata"):
        qrefta.consolidate(folder / "tiny", folder / "tiny", tmp_path / "out")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(parts, unfinished, ignore=shutil.ignore_patterns(".metadata"))
    with pytest.raises(ValueError, match=r"is no sharded checkpoint.*\.metadata"):
        qrefta.consolidate(unfinished, folder / "tiny", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]


def test_sharding_twice_or_without_processes_is_refused(folder):
    for rank in results(folder, "by-hand-2", 2):
        assert "no process group" in rank["too early"]
        assert "sharded already" in rank["twice"]


def test_tensors_on_the_disk_are_separate_and_leave_no_file(tmp_path):
    forms = {"a": (torch.int8, (3, 5)), "b": (torch.bfloat16, ()), "none": (torch.uint8, (0, 2))}
    tensors = empty_on_disk(tmp_path, forms)
    tensors["a"].fill_(7)
    tensors["b"].fill_(2)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == forms
    assert (tensors["a"] == 7).all()
    assert tensors["a"].untyped_storage().nbytes() == 15
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(file, start, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=r"cannot keep a model \(0\.0 MB\) in a file in"):
        empty_on_disk(tmp_path, {"a": (torch.int8, (8,))})


def test_tensors_on_disk_need_no_room_reserved(tmp_path, monkeypatch):
    """macOS and Windows have no posix_fallocate."""
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    tensors = empty_on_disk(tmp_path, {"a": (torch.int16, (3, 4))})
    assert_close(tensors["a"], torch.zeros(3, 4, dtype=torch.int16))
