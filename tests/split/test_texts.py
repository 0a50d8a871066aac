"""Text to calibrate with: files, windows of running text, rows, batches of similar length."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from qrefta.split import texts as texts_module
from qrefta.split.texts import (
    batches_by_length,
    generic_texts,
    read_texts,
    rows_of_text,
    token_stream,
    windows_of_text,
)
from tests.tiny import color_rows, tiny_tokenizer


def with_end():
    """A tokenizer whose end-of-text token is also its unknown one."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[UNK]"
    return tokenizer


def test_text_and_tables_give_the_same_texts(tmp_path):
    texts = [row["text"] for row in color_rows(12, seed=5)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n   \n")
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "note": t}) for i, t in enumerate(texts))
    )
    (tmp_path / "a.csv").write_text(
        "title,sentence\n" + "\n".join(f"blue,{text}" for text in texts)
    )
    (tmp_path / "a.tsv").write_text("title\ttext\n" + "\n".join(f"blue\t{text}" for text in texts))
    for name in "a.txt", "a.jsonl", "a.csv", "a.tsv":
        assert read_texts(tmp_path / name) == texts


def test_files_without_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        read_texts(tmp_path / "none.txt")
    for name, content in ("a.txt", "\n \n"), ("a.csv", ""), ("a.jsonl", '{"text": ""}\n'):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="holds no text"):
            read_texts(tmp_path / name)
    for name, content in ("b.csv", "text\n"), ("b.jsonl", '{"text": '):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="cannot be read as a table"):
            read_texts(tmp_path / name)
    (tmp_path / "n.csv").write_text("n\n1\n")
    with pytest.raises(ValueError, match="no column of text"):
        read_texts(tmp_path / "n.csv")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match="ends in"):
        read_texts(tmp_path / "a.pdf")


def test_windows_are_cut_from_the_texts_in_order_with_ends_between():
    tokenizer = with_end()
    texts = ["red blue", "blue", "red red red"]
    red, blue = tokenizer("red blue")["input_ids"]
    end = tokenizer.eos_token_id
    stream = [red, blue, end, blue, end, red, red, red, end]
    assert token_stream(texts, tokenizer) == stream
    (batch,) = windows_of_text(texts, tokenizer, max_length=4)
    assert batch["input_ids"].tolist() == [stream[:4], stream[4:8]]


def test_a_tokenizer_that_ends_texts_itself_ends_them_once():
    tokenizer = with_end()
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    template = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.backend_tokenizer.post_processor = template
    assert token_stream(["red blue", "blue"], tokenizer) == token_stream(
        ["red blue", "blue"], with_end()
    )


def test_a_text_shorter_than_a_window_is_one_short_window():
    (batch,) = windows_of_text(["red blue"], tiny_tokenizer(), max_length=512)
    assert batch["input_ids"].shape == (1, 2)


def test_windows_are_chosen_by_seed_within_the_budget(monkeypatch):
    monkeypatch.setattr(texts_module, "BATCH_TOKENS", 10)
    texts = [row["text"] for row in color_rows(200, seed=5)]
    one, same, other = (
        windows_of_text(texts, tiny_tokenizer(), tokens=23, max_length=4, seed=seed)
        for seed in (0, 0, 1)
    )
    assert [len(batch["input_ids"]) for batch in one] == [2, 2, 1]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other))


def test_long_texts_are_read_in_evenly_spread_pieces():
    texts = ["".join(chr(0x4E00 + i) for i in range(10_000)), "a", "b" * 10_000]
    spread = texts_module._spread(texts, 640)
    joined = "".join(spread)
    assert 600 < len(joined) <= 640  # a piece may hold the end of a text
    assert 300 <= joined.count("b") <= 340  # half of the characters are b
    assert texts_module._spread(texts, 10**6) is texts


def test_rows_are_chosen_by_seed_and_padded_with_texts_of_like_length(monkeypatch):
    tokenizer = tiny_tokenizer()
    texts = [("red ", "blue ")[words % 2] * words for words in (5, 2, 8, 1, 6, 3, 7, 4)]
    monkeypatch.setattr(texts_module, "BATCH_TOKENS", 12)
    shapes = [tuple(batch["input_ids"].shape) for batch in rows_of_text(texts, tokenizer)]
    assert shapes == [(3, 3), (2, 5), (1, 6), (1, 7), (1, 8)]
    short = rows_of_text(texts, tokenizer, max_length=2)
    assert sum(int(batch["attention_mask"].sum()) for batch in short) == 1 + 7 * 2
    one, same, other = (rows_of_text(texts, tokenizer, rows=3, seed=seed) for seed in (0, 0, 1))
    counts = [[int(batch["attention_mask"].sum()) for batch in x] for x in (one, same, other)]
    assert counts[0] == counts[1] != counts[2]


@pytest.mark.parametrize(("eos", "shapes"), [("[UNK]", [(2, 3)]), (None, [(1, 3), (1, 1)])])
def test_a_tokenizer_without_pad_token_stays_without(eos, shapes):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, eos
    batches = rows_of_text(["red", "red blue red"], tokenizer)
    assert sorted(tuple(batch["input_ids"].shape) for batch in batches) == sorted(shapes)
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == 4
    assert tokenizer.pad_token is None


def test_a_row_longer_than_the_budget_is_a_batch(monkeypatch):
    monkeypatch.setattr(texts_module, "BATCH_TOKENS", 10)
    rows = [{"input_ids": [0] * length} for length in (5, 1, 30, 2)]
    batches = batches_by_length(rows, lambda batch: [len(row["input_ids"]) for row in batch])
    assert batches == [[1, 2], [5], [30]]


def test_generic_text_is_prose_and_always_the_same(monkeypatch):
    texts = generic_texts()
    assert texts == generic_texts()
    characters = sum(map(len, texts))
    assert 200_000 < characters <= 1_000_000
    assert sum(text.count(" ") for text in texts) > characters / 20
    monkeypatch.setattr(texts_module, "_GENERIC_CHARACTERS", 5000)
    assert 4000 < sum(map(len, generic_texts())) <= 5000


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="must be >= 1"):
        rows_of_text(["red"], tiny_tokenizer(), rows=0)
    with pytest.raises(ValueError, match="must be >= 1"):
        windows_of_text(["red"], tiny_tokenizer(), tokens=0)
