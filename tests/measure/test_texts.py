"""Text files are cut into windows in order, without overlap."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from qrefta.measure.texts import Text, cut_windows, read_text
from tests.pages import language_tokenizer

WORDS = Text("words.txt", " ".join(f"w{index}" for index in range(10)))


def with_bos():
    """The tokenizer of words, which puts w3 before a text."""
    tokenizer = language_tokenizer()
    tokenizer.bos_token = "w3"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w3 $A", special_tokens=[("w3", 3)]
    )
    return tokenizer


def numbers(windows):
    return [window.tolist() for window in windows]


def test_windows_cover_the_text_in_order():
    windows = cut_windows(WORDS, language_tokenizer(), length=4)
    assert numbers(windows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert windows[0].dtype == torch.long


def test_a_last_token_without_context_is_dropped():
    windows = cut_windows(WORDS, language_tokenizer(), length=3)
    assert numbers(windows) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_limit_counts_windows():
    assert numbers(cut_windows(WORDS, language_tokenizer(), 4, limit=1)) == [[0, 1, 2, 3]]


def test_a_short_text_is_one_short_window():
    assert numbers(cut_windows(WORDS, language_tokenizer(), length=512)) == [list(range(10))]


def test_each_window_starts_with_the_bos_token_where_texts_do():
    """It takes a place in the window, and the last token has it as context."""
    windows = cut_windows(WORDS, with_bos(), length=4)
    assert numbers(windows) == [[3, 0, 1, 2], [3, 3, 4, 5], [3, 6, 7, 8], [3, 9]]


def test_a_bos_token_that_texts_do_not_have_is_not_added():
    tokenizer = language_tokenizer()
    tokenizer.bos_token = "w3"
    assert numbers(cut_windows(WORDS, tokenizer, length=5))[0] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("content", "count"), [("", 0), ("w5", 1)])
def test_a_text_without_two_tokens_is_refused(content, count):
    with pytest.raises(ValueError, match=rf"words\.txt has {count} tokens; at least 2"):
        cut_windows(Text("words.txt", content), with_bos(), length=4)


@pytest.mark.parametrize(
    ("length", "limit", "message"),
    [(1, None, "window is 1; it must be at least 2"), (4, 0, "limit is 0; it must be at least 1")],
)
def test_sizes_without_a_window_are_refused(length, limit, message):
    with pytest.raises(ValueError, match=message):
        cut_windows(WORDS, language_tokenizer(), length, limit)


def test_a_file_is_read_as_it_is(tmp_path):
    file = tmp_path / "folder" / "text.txt"
    file.parent.mkdir()
    file.write_bytes("Gr\u00fc\u00dfe\r\n\n".encode())
    assert read_text(file) == ("folder/text.txt", "Gr\u00fc\u00dfe\r\n\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_text(encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes("line\r\nline".encode(encoding))
    assert read_text(tmp_path / "a.txt").content == "line\r\nline"


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no text file .*none\.txt"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"text \xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.txt is not text in UTF-8: line 1, byte 0xff"):
        read_text(tmp_path / "binary.txt")
