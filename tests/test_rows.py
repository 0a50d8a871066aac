"""Rows of measurements: context, appending, schema."""

import json

import pytest

from eval.rows import SCHEMA, append, read


def test_rows_carry_their_context_and_are_added_to_what_is_there(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    append(file, [{"value": 1.5}], seed=3)
    append(file, [{"value": 2.5}, {"value": 3.5}], seed=4)
    rows = read(file)
    assert [(row["value"], row["seed"]) for row in rows] == [(1.5, 3), (2.5, 4), (3.5, 4)]
    assert all(row["schema"] == SCHEMA and row["device"] and row["threads"] >= 1 for row in rows)
    assert {"torch", "transformers", "bitsandbytes", "qrefta"} <= set(rows[0]["versions"])


def test_rows_of_another_schema_are_refused_with_their_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"schema": SCHEMA}) + "\n" + json.dumps({"schema": SCHEMA + 1}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: schema 2; this version reads 1"):
        read(file)
