"""Running text: a file is one document in order, and its tail is held out."""

import json
import tracemalloc

import pytest
from datasets import Dataset, DatasetDict

import qrefta
from qrefta.train.tasks import lm, load_text
from qrefta.train.tasks.lm import documents, text_windows
from tests.models import prepared, tiny_llama
from tests.pages import language_tokenizer
from tests.train.talk import letters

TEXT = "".join(f"Line {index}.\n\n\tIt goes on;\r\n" for index in range(40))


@pytest.fixture
def tokenizer():
    return letters()


def windows(source, tokenizer, length=10, seed=0):
    return text_windows(tiny_llama(), tokenizer, load_text(source, seed), length)


def text_of(part, tokenizer):
    return "".join(tokenizer.decode(ids) for ids in part["input_ids"])


@pytest.mark.parametrize("size", [7, 100, 1_000_000])
def test_a_file_is_one_document_in_order_with_its_tail_held_out(
    size, tokenizer, tmp_path, monkeypatch
):
    """However it is cut into pieces to be read, every character is there once."""
    monkeypatch.setattr(lm, "_CHARACTERS", size)
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    recipe = windows(file, tokenizer)
    whole = (TEXT + "<end>")[: len(recipe.train) * 10 + len(recipe.test) * 10]
    assert len(TEXT) - len(whole) < 10
    assert text_of(recipe.train, tokenizer) + text_of(recipe.test, tokenizer) == whole
    assert len(recipe.test) == round(0.1 * (len(recipe.train) + len(recipe.test)))
    batch = recipe.collate([recipe.train[0], recipe.train[1]])
    assert batch["input_ids"].shape == (2, 10)
    assert batch["labels"].equal(batch["input_ids"])


def test_another_column_of_text_is_read_if_it_is_named(tmp_path):
    rows = [{"title": f"title {index}", "Body": f"body {index}"} for index in range(10)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_text(file, 0, "body")["train"][0]["text"].startswith("body")
    with pytest.raises(ValueError, match=r"no column 'none' in .*columns are \['title', 'Body'\]"):
        load_text(file, 0, "none")
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(ValueError, match=r"holds \.txt files, which have no column 'body'"):
        load_text(tmp_path / "a.txt", 0, "body")


def test_a_changed_file_is_read_again(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    for content in ("a" * 40, "b" * 40):
        file.write_text(content)
        assert text_of(windows(file, tokenizer).train, tokenizer) == content[:30]


def test_a_folder_holds_documents_and_some_of_them_are_the_test(tokenizer, tmp_path):
    """Each document ends with one end-of-text token; lines and files without text end too."""
    for index in range(20):
        folder = tmp_path / f"part{index % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{index:02}.txt").write_text(f"{index:02}\nabc\n")
    recipe = windows(tmp_path, tokenizer, length=8)
    train = text_of(recipe.train, tokenizer).removesuffix("<end>").split("<end>")
    test = text_of(recipe.test, tokenizer).removesuffix("<end>").split("<end>")
    assert (len(train), len(test)) == (18, 2)
    order = sorted(range(20), key=lambda index: (index % 2, index))
    kept = [text for text in (f"{index:02}\nabc\n" for index in order) if text not in test]
    assert train == kept
    other = windows(tmp_path, tokenizer, length=8, seed=1)
    assert text_of(other.test, tokenizer) != text_of(recipe.test, tokenizer)


def test_rows_of_tables_are_documents(tokenizer, tmp_path):
    for name in ("a", "b"):
        rows = [{"id": "x", "content": f"{name}{index}\nabcde"} for index in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = windows(tmp_path, tokenizer, length=9)
    texts = text_of(recipe.train, tokenizer).removesuffix("<end>").split("<end>")
    assert len(texts) == 18
    assert {text[0] for text in texts} == {"a", "b"}
    assert all(text[2:] == "\nabcde" for text in texts)


def test_a_folder_with_splits_is_read_as_splits(tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text("a" * 50)
    (tmp_path / "valid.txt").write_text("b" * 50)
    recipe = windows(tmp_path, tokenizer)
    assert text_of(recipe.train, tokenizer) == "a" * 50
    assert text_of(recipe.test, tokenizer) == "b" * 50


def test_a_document_begins_as_the_tokenizer_begins_texts(tokenizer, tmp_path, monkeypatch):
    """Llama's <s> opens a document, not each piece of it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    monkeypatch.setattr(lm, "_CHARACTERS", 5)
    (tmp_path / "train.txt").write_text("ab cd ef\n" * 3)
    (tmp_path / "test.txt").write_text("ab cd ef\n")
    recipe = windows(tmp_path, tokenizer, length=1)
    assert text_of(recipe.train, tokenizer) == "<s>" + "ab cd ef\n" * 3 + "<end>"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("qrefta.train.tasks.lm._CHARACTERS", 100_000)
    peaks = []
    for lines in (3_000, 9_000):
        file = tmp_path / f"{lines}.txt"
        file.write_text(("x" * 99 + "\n") * lines)
        tracemalloc.start()
        recipe = windows(file, tokenizer, length=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(recipe.train) + len(recipe.test) == lines
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"caf\xe9"}, "a.txt is not text in UTF-8"),
        ({"a.txt": b"short"}, "train split has less than 20 tokens; give more text or a lower"),
        ({"a.txt": b"text", "b.csv": b"text\nx\n"}, "b.csv is among .txt files"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": null}\n'}, r"\(train\), row 2, column text: there"),
        (
            {"a.csv": b"id,text\n1,x\n2,\n"},
            r"\(train\), row 2, column text: there is no text but None",
        ),
        ({"a.csv": b"id,text\n1,x\n2,  \n"}, r"row 2, column text: there is no text but '  '"),
        ({"a.jsonl": b'{"text": "x"}\n', "b.csv": b"text\nx\n"}, "files of different kinds"),
    ],
)
def test_unusable_text_is_refused(files, message, tokenizer, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        windows(tmp_path, tokenizer)


def test_rows_of_text_in_memory_are_documents(tmp_path):
    """The same windows as from a file with these rows."""
    rows = [f"w{index} w5 w6\nw7" for index in range(8, 40)]
    part = Dataset.from_dict({"text": rows})
    parts = documents(DatasetDict(train=part, test=part), "the data", 0)
    given = text_windows(tiny_llama(), language_tokenizer(), parts, 6)
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    read = text_windows(tiny_llama(), language_tokenizer(), load_text(folder, 0), 6)
    assert given.train.to_list() == read.train.to_list()
    part = Dataset.from_dict({"text": ["", "a"]})
    data = DatasetDict(train=part, test=part)
    with pytest.raises(ValueError, match=r"the data \(train\), row 1, column text: there"):
        documents(data, "the data", 0)


def test_text_in_utf_16_and_files_in_capital_letters_are_read(tokenizer, tmp_path):
    (tmp_path / "A.TXT").write_bytes(("é" * 40).encode("utf-16"))
    recipe = windows(tmp_path / "A.TXT", tokenizer)
    assert text_of(recipe.train, tokenizer) + text_of(recipe.test, tokenizer) == "é" * 40


def test_settings_of_generation_that_are_not_saved_are_refused_before_a_step(tmp_path):
    model = prepared(tiny_llama, rank=2)
    model.generation_config.temperature = 0.7  # without sampling
    rows = Dataset.from_dict({"text": ["w3 w4 w5 " * 10] * 4})
    data = DatasetDict(train=rows, test=rows)
    with pytest.raises(ValueError, match="temperature"):
        qrefta.finetune(
            model, language_tokenizer(), data, tmp_path / "out", task="lm", max_length=8
        )
    assert not (tmp_path / "out").exists()
