"""Files that are written whole or not at all, by one process or several, and how large they are."""

import pytest
import torch
from safetensors.torch import load_file

from qrefta.files.header import DTYPES
from qrefta.files.safetensors import Checkpoint
from qrefta.files.shards import ShardWriter, copy_shard, write_shard
from qrefta.files.whole_file import remove_temporary_files, replace_text


class Interrupted(Checkpoint):
    """Ctrl-C while a file is written; `then` runs at that moment."""

    def bytes_of(self, name):
        yield from super().bytes_of(name)
        self.then()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_shard(folder / "model.safetensors", {"a": torch.arange(9)})
    return Interrupted(folder)


def test_ctrl_c_leaves_no_file(source, tmp_path):
    def stop():
        raise KeyboardInterrupt

    source.then = stop
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        copy_shard(out / "model.safetensors", source, ["a"])
    assert list(out.iterdir()) == []


def test_a_process_does_not_publish_the_half_written_file_of_another(source, tmp_path):
    file = tmp_path / "model.safetensors"
    seen = []

    def other():
        write_shard(file, {"b": torch.ones(3)})
        seen.append(Checkpoint(tmp_path).names)

    source.then = other
    copy_shard(file, source, ["a"])
    assert seen == [["b"]]
    assert Checkpoint(tmp_path).names == ["a"]
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "source"}


def test_only_files_of_killed_processes_are_cleared(tmp_path):
    replace_text(tmp_path / "a.json", "{}")
    for name in ("mine.tmp", "a.json.0123456789abcdef.tmp"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "mine.tmp"}


@pytest.mark.parametrize(
    ("sizes", "files"),
    [
        ([6, 6, 6], [[6], [6], [6]]),
        ([4, 4, 4, 4], [[4, 4], [4, 4]]),
        ([2, 30, 2, 2], [[2], [30], [2, 2]]),
        ([10, 1], [[10], [1]]),
    ],
)
def test_files_stay_below_their_maximum_but_for_a_larger_tensor(sizes, files, tmp_path):
    writer = ShardWriter(tmp_path, "model-", 10)
    for index, size in enumerate(sizes):
        writer.add(str(index), torch.zeros(size, dtype=torch.int8))
    written = [Checkpoint.of_files([tmp_path / file]) for file in writer.close()]
    assert [[one.nbytes(name) for name in one.names] for one in written] == files


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_every_dtype_of_safetensors_is_written_and_read(dtype, tmp_path):
    """Such as complex tables of rotary positions, and masks in uint16."""
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    write_shard(tmp_path / "model.safetensors", {"a": tensor})
    mapped = Checkpoint(tmp_path).mapped(["a"])["a"]
    for read in (mapped, load_file(tmp_path / "model.safetensors")["a"]):
        assert read.dtype == dtype
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_a_dtype_that_files_do_not_hold_is_named_and_no_file_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"table has the dtype torch\.complex128"):
        write_shard(tmp_path / "model.safetensors", {"table": torch.ones(2).to(torch.complex128)})
    assert list(tmp_path.iterdir()) == []
