"""Rows of measurements: context, appending, schema."""

import json

import pytest

from eval import rows
from eval.rows import SCHEMA, append, find, read


def test_rows_carry_their_context_and_are_appended(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    append(file, [{"value": 1.5}], seed=3)
    append(file, [{"value": 2.5}, {"value": 3.5}], seed=4)
    rows = read(file)
    assert [(row["value"], row["seed"]) for row in rows] == [(1.5, 3), (2.5, 4), (3.5, 4)]
    assert all(row["schema"] == SCHEMA and row["device"] and row["threads"] >= 1 for row in rows)
    assert {"torch", "transformers", "bitsandbytes", "qrefta"} <= set(rows[0]["versions"])


def test_rows_of_another_schema_are_refused_with_their_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"schema": SCHEMA}) + "\n" + json.dumps({"schema": SCHEMA + 1}) + "\n"
    )
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: schema 2; this version reads 1"):
        read(file)


def test_a_line_that_a_killed_run_left_unfinished_is_not_read_and_makes_room(tmp_path):
    file = tmp_path / "rows.jsonl"
    append(file, [{"value": 1}, {"value": 2}], seed=0)
    whole = file.read_text()
    for cut in (1, 20, len(whole.splitlines()[1])):
        file.write_text(whole[:-cut])
        assert [row["value"] for row in read(file)] == ([1, 2] if cut == 1 else [1])
        append(file, [{"value": 3}], seed=0)
        assert [row["value"] for row in read(file)] == ([1, 2, 3] if cut == 1 else [1, 3])
        assert file.read_text().endswith("\n")


def test_a_cut_inside_a_letter_and_unusual_line_separators(tmp_path):
    """A letter of several bytes may be cut; U+2028 is not a line break of JSON lines."""
    file = tmp_path / "rows.jsonl"
    append(file, [{"text": "caf\u00e9 \u2028 x"}, {"text": "\u00e9"}], seed=0)
    data = file.read_bytes()
    file.write_bytes(data[: data.rindex("\u00e9".encode()) + 1])
    assert [row["text"] for row in read(file)] == ["caf\u00e9 \u2028 x"]
    append(file, [{"text": "new"}], seed=0)
    assert [row["text"] for row in read(file)] == ["caf\u00e9 \u2028 x", "new"]
    file.write_bytes(b"")
    assert read(file) == []


def test_a_line_that_is_no_row_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"schema": 1}\n{"schema": 1, \n{"schema": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is not JSON"):
        read(file)
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1: schema \[1\]"):
        read(file)


def test_a_row_is_found_by_its_values_the_last_first():
    rows = [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2}]
    assert find(rows, {"a": 1}) == {"a": 1, "b": 2}
    assert find(rows, {"a": 1, "b": 1}) == {"a": 1, "b": 1}
    assert find(rows, {"b": None}) is None


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(rows, "PACKAGES", ("torch", "no-such-package"))
    assert set(rows.context(seed=0)["versions"]) == {"qrefta", "torch"}


def test_a_copy_without_git_takes_the_commit_from_the_environment(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(rows.subprocess, "run", missing)
    monkeypatch.delenv("QREFTA_COMMIT", raising=False)
    assert rows.context(seed=0, device="cpu")["commit"] == "unknown"
    monkeypatch.setenv("QREFTA_COMMIT", "0123456789ab")
    assert rows.context(seed=0, device="cpu")["commit"] == "0123456789ab"


def test_a_row_of_a_gpu_names_card_driver_and_cuda(monkeypatch):
    monkeypatch.setattr(rows.torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(rows, "_driver", lambda: "580.1")
    row = rows.context(seed=0, device="cuda")
    assert (row["device"], row["driver"]) == ("A card", "580.1")
    assert "cuda" in row
    assert not {"cuda", "driver"} & set(rows.context(seed=0, device="cpu"))
