"""New folders: a link, a mount point or the current folder may be given; finished work is kept."""

import os
import subprocess
from pathlib import Path

import pytest

from qrefta.files.folders import new_folder
from qrefta.files.whole_file import replace_text

NAMES = {"config.json", "model.safetensors", "code"}


def write(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    (folder / "code").mkdir()
    (folder / "code" / "a.py").write_text("")


def fill(out, then=lambda folder: None):
    with new_folder(out) as folder:
        write(folder)
        then(folder)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_link_to_an_empty_folder_is_filled_and_stays_a_link(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "out"
    link.symlink_to(disk, target_is_directory=True)
    with new_folder(link) as folder:
        assert disk in folder.parents  # a disk other than the link's may be meant
        write(folder)
    assert link.is_symlink()
    assert names(disk) == NAMES
    assert names(tmp_path) == {"disk", "out"}


def test_the_current_folder_is_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder(".") as folder:
        write(folder)
    assert names(tmp_path) == NAMES


def test_an_empty_mount_point_is_filled(tmp_path):
    out = tmp_path / "disk"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", out], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted")
    try:
        with new_folder(out) as folder:
            write(folder)
        assert names(out) == NAMES
    finally:
        subprocess.run(["umount", "--lazy", out], check=True)


@pytest.mark.parametrize("exists", [False, True])
def test_two_processes_on_one_folder_lose_nothing(exists, tmp_path):
    """The second to finish is refused, and its files are kept."""
    out = tmp_path / "out"
    other = out / "other" if exists else out
    if exists:
        out.mkdir()
    written = []

    def meanwhile(folder):
        written.append(folder)
        other.mkdir()
        write(other)

    with pytest.raises(FileExistsError, match="are kept in") as refused:
        fill(out, meanwhile)
    assert str(written[0]) in str(refused.value)
    assert names(written[0]) == names(other) == NAMES


def test_a_second_process_is_refused_where_one_writes(tmp_path):
    with new_folder(tmp_path), pytest.raises(ValueError, match="exists and is not empty"):
        fill(tmp_path)


def test_the_config_is_moved_last_and_files_are_kept_if_a_move_fails(tmp_path, monkeypatch):
    move = Path.replace
    moved = []

    def failing(path, target):
        if path.name == "config.json":
            raise OSError(5, "Input/output error")
        moved.append(path.name)
        return move(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match=r"Input/output error.*are kept in") as refused:
        fill(tmp_path)
    assert set(moved) == NAMES - {"config.json"}
    kept = next(path for path in tmp_path.iterdir() if path.name not in moved)
    assert str(kept) in str(refused.value)
    assert names(kept) == {"config.json"}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_unfinished_work_is_removed(error, exists, tmp_path):
    out = tmp_path / "out"
    if exists:
        out.mkdir()

    def fail(folder):
        raise error

    with pytest.raises(error):
        fill(out, fail)
    assert [*tmp_path.rglob("*")] == ([out] if exists else [])


def test_a_folder_that_cannot_be_synced_is_written(tmp_path, monkeypatch):
    """Windows opens no folders, and some network file systems sync none."""
    opened = os.open

    def files_only(path, *arguments, **keywords):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", files_only)
    replace_text(tmp_path / "a.txt", "text")
    fill(tmp_path / "out")
    assert (tmp_path / "a.txt").read_text() == "text"
    assert names(tmp_path / "out") == NAMES


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_a_new_folder_has_the_rights_that_the_user_gives_new_folders(umask, tmp_path):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            write(folder)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
