"""The killer finds half-written, unreadable and unequal files, and reports nothing else."""

import random
import time

import pytest

from eval.robustness.kills import Job, kill

PARTS = 8


def in_place(folder):
    """Write a file line by line at its final place, after a mark that it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mark").touch()
    with (folder / "data").open("w") as file:
        for part in range(PARTS):
            print(part, file=file, flush=True)
            time.sleep(0.01)


def renamed(folder):
    """Write a file under another name; rename it and set the mark at the end."""
    written = folder / "tmp"
    in_place(written)
    (written / "data").rename(folder / "data")
    (folder / "mark").touch()


def differing(folder):
    """Resume, but record every start."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as file:
        file.write("x")
    renamed(folder)


def load(folder):
    assert len((folder / "data").read_text().split()) == PARTS


def tally(work, tmp_path):
    def whole(folder):
        return [folder] if (folder / "mark").exists() else []

    return kill(
        Job(work, whole, load, lambda folder: (folder / "tmp").exists()),
        tmp_path / "job",
        6,
        random.Random(0),
    )


def test_a_file_written_in_place_is_found_half_written(tmp_path):
    found = tally(in_place, tmp_path)
    assert found.kills >= 6
    assert found.half_written > 0
    assert found.unreadable > 0
    assert found.unequal == 0


def test_a_file_that_is_renamed_is_not(tmp_path):
    found = tally(renamed, tmp_path)
    assert (found.half_written, found.unreadable, found.unequal) == (0, 0, 0)
    assert found.kills >= found.writing > 0


def test_an_end_that_depends_on_the_kills_is_found(tmp_path):
    assert tally(differing, tmp_path).unequal > 0


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_first_run_that_is_held_up_does_not_make_all_kills_too_late(tmp_path):
    def held_up(folder):
        if not (tmp_path / "ran").exists():
            (tmp_path / "ran").touch()
            time.sleep(2)
        renamed(folder)

    assert tally(held_up, tmp_path).kills >= 6


def test_a_failed_job_raises(tmp_path):
    with pytest.raises(RuntimeError, match="nothing to do"):
        tally(lambda folder: (_ for _ in ()).throw(ValueError("nothing to do")), tmp_path)
