"""Tables as spreadsheets, pandas and other programs write them; errors name file, row and fix."""

import json

import pandas
import pytest

from qrefta.files.csv_file import csv_rows
from qrefta.files.encodings import text_encoding
from qrefta.files.tables import read_files, text_column

LINES = ["text,label", *(f"número {index},{'no' if index % 2 else 'yes'}" for index in range(4))]
ROWS = [{"text": f"número {index}", "label": ("yes", "no")[index % 2]} for index in range(4)]


def read(path, content, header=None):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_files({"train": [path]}, header)["train"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_that_a_file_shows_are_read(encoding, newline, tmp_path):
    content = newline.join([*LINES, ""]).encode(encoding)
    assert read(tmp_path / "rows.csv", content).to_list() == ROWS


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "cp1251", "shift-jis"])
def test_an_encoding_of_one_byte_a_character_is_refused_with_its_line(encoding, tmp_path):
    text = {"cp1251": "да", "shift-jis": "日本"}.get(encoding, "número")
    file = tmp_path / "rows.csv"
    message = r"rows\.csv is not text in UTF-8: line 3, byte 0x.*iconv -f cp1252 -t utf-8"
    with pytest.raises(ValueError, match=message):
        read(file, f"text,label\na,b\n{text},c\n".encode(encoding))
    assert text_encoding(file) == "utf-8-sig"


@pytest.mark.parametrize(
    ("name", "delimiter"),
    [
        ("a.csv", ";"),
        ("a.csv", "\t"),
        ("a.csv", "|"),
        ("a.tsv", "\t"),
        ("a.tsv", ","),
        ("A.CSV", ","),
    ],
)
def test_the_delimiter_is_found_in_the_first_line(name, delimiter, tmp_path):
    content = "\n".join(LINES).replace(",", delimiter)
    assert read(tmp_path / name, content).to_list() == ROWS
    names = ["text", "label"]
    rows = read(tmp_path / f"no{name}", content.split("\n", 1)[1], header=names)
    assert rows.to_list() == ROWS


def test_a_line_of_excel_and_empty_lines_are_no_rows(tmp_path):
    content = "sep=;\n" + "\n\n".join(LINES).replace(",", ";") + "\n\n"
    assert read(tmp_path / "a.csv", content).to_list() == ROWS
    assert read(tmp_path / "b.csv", "\n\n" + "\n".join(LINES)).to_list() == ROWS


def test_cells_are_text_as_they_are_written(tmp_path):
    """pandas reads NA, null and None as missing, and 007 as a number."""
    words = ["NA", "null", "None", "nan", "007", "1.0", "True", " a "]
    content = "text,label\n" + "".join(f"{word},{word}\n" for word in words)
    assert read(tmp_path / "a.csv", content)["text"] == words
    assert read(tmp_path / "b.csv", 'text,label\n,a\n"",b\n')["text"] == [None, None]


def test_quotations_hold_delimiters_newlines_and_marks(tmp_path):
    texts = ["one\ntwo", "three, four", 'the "fifth"', "six", "seven\r\neight"]
    pandas.DataFrame({"text": texts, "label": range(5)}).to_csv(tmp_path / "a.csv", index=False)
    data = read_files({"train": [tmp_path / "a.csv"]})["train"]
    assert data["text"] == texts
    paths = 'text,label\n"C:\\dir\\",1\n"a ""b"" \\n" ,2\nhe said \\"x\\",3\n5" disk,4\n'
    texts = ["C:\\dir\\", 'a "b" \\n ', 'he said \\"x\\"', '5" disk']
    assert read(tmp_path / "b.csv", paths)["text"] == texts
    marks = ['"one', 'two"', 'thr"ee']  # as in GLUE
    assert read(tmp_path / "a.tsv", "text\tid\n" + "\t1\n".join([*marks, ""]))["text"] == marks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", r"row 2, has 3 cells and there are 2 columns, \['a', 'b'\]: '1,2,3'"),
        ("a,b\n1,2,3\n4,5,6\n", "row 1, has 3 cells"),  # pandas takes the first for an index
        ("a,b\n1,2\n\n1\n", "row 2, has 1 cells"),  # an empty line is no row
        ("a\nHello, you\n", "row 1, has 2 cells"),
        ('a,b\n"1,2\n3,4\n', r"row 1, column a: the quotation that begins with .* does not end"),
        ('a,b\n1,"2\n3,4\n5,6\n', r"row 1, column b: .* begins with '2\\n3,4.* does not end"),
        ('a,b\n1,2\n"a \\"b\\"",1\n', r"row 2, column a: the quotation 'a .* ends before 'b"),
        ('a,b\n1,"a \\"b, c\\""\n', "row 1, column b: .* not behind a backslash"),
        ('a,b\n1,"a \\""\n', "row 1, column b: .* does not end"),
        ('a;b\n\n1;"a\n"""";\n\\"c"\n', "row 1, column b: .* ends before 'c"),
        ('a,b\n"1\nx" y,2\n', "row 1, column a: .* ends before 'y,2'"),
        ("a,a,b\n1,2,3\n", "two columns 'a'; rename or remove"),
        ("a,b\n", r"has one line, 'a,b\\n', and no rows"),
        ("", "is empty"),
        ("\n\n", "is empty"),
    ],
)
def test_broken_tables_are_refused_with_their_row(content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"rows\.csv.*{message}"):
        read(tmp_path / "rows.csv", content)


def test_columns_without_a_name_are_numbered(tmp_path):
    data = read(tmp_path / "a.csv", ",text,\n0,a,\n1,b,\n")
    assert data.column_names == ["column 1", "text", "column 3"]
    assert text_column(data, "a.csv") == "text"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_column_name_may_hold_a_line_break(newline, tmp_path):
    """As Excel writes it. Rows keep their numbers."""
    file = tmp_path / "a.csv"
    lines = ["", 'text,"the', 'label"', "red,1", '"a, b",0']
    file.write_text(newline.join(lines) + newline, newline="")
    assert list(csv_rows(file)) == [
        {"text": "red", "the label": "1"},
        {"text": "a, b", "the label": "0"},
    ]
    file.write_text(newline.join([*lines, "red"]) + newline, newline="")
    with pytest.raises(ValueError, match="row 3, has 1 cells"):
        list(csv_rows(file))
    file.write_text(newline.join([*lines, '"red" x,1']) + newline, newline="")
    with pytest.raises(ValueError, match="row 3"):
        list(csv_rows(file))
    file.write_text(newline.join(['5" disk,label', "red,1", 'a 3" nail,0']) + newline, newline="")
    assert list(csv_rows(file)) == [
        {'5" disk': "red", "label": "1"},
        {'5" disk': 'a 3" nail', "label": "0"},
    ]


def test_rows_far_down_keep_their_number(tmp_path, monkeypatch):
    """The file is read in blocks."""
    monkeypatch.setattr("qrefta.files.csv_file._BLOCK_BYTES", 1000)
    content = "a,b\n" + "1,2\n" * 5000
    assert len(read(tmp_path / "a.csv", content)) == 5000
    with pytest.raises(ValueError, match="row 5001, has 1 cells"):
        read(tmp_path / "a.csv", content + "3\n")


def test_files_of_a_split_need_the_same_columns(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    (tmp_path / "b.csv").write_text("label,text\nb,a\n")
    with pytest.raises(ValueError, match=r"b\.csv has the columns \['label', 'text'\]"):
        read_files({"train": [tmp_path / "a.csv", tmp_path / "b.csv"]})


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps({"data": ROWS}),
        json.dumps({"version": 1, "examples": ROWS}, indent=1),
        "\n\n".join(map(json.dumps, ROWS)),
        "\ufeff" + "\n".join(map(json.dumps, ROWS)),
    ],
)
def test_json_is_rows_a_list_or_an_object_with_a_list(content, tmp_path):
    assert read(tmp_path / "ROWS.JSON", content).to_list() == ROWS


def test_a_single_conversation_is_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read(tmp_path / "a.json", json.dumps(row)).to_list() == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"},\n{"text": "b"},\n',
            r"row 1, is not JSON: .*'\{\"text\": \"a\"\},'.* comma",
        ),
        ('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "row 2, is not JSON"),
        ('{"text": "a"}\n"b"\n', "row 2, is '\"b\"'; it must be an object"),
        ('{"text": "é"}\n'.encode("utf-16"), "is text in UTF-16, and JSON is read in UTF-8"),
        ('{"text": "a"}\n{"text": "é"}\n'.encode("cp1252"), "not text in UTF-8: line 2, byte 0xe9"),
        ("", "is empty"),
    ],
)
def test_broken_json_lines_are_refused_with_their_row(content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*{message}"):
        read(tmp_path / "rows.jsonl", content)


def test_the_column_of_text_is_the_usual_one_or_the_first_with_a_warning(tmp_path):
    data = read(tmp_path / "a.csv", "id,Text,note\n1,a,b\n")
    assert text_column(data, "a.csv") == "Text"
    data = read(tmp_path / "b.csv", "id,title,body\n1,a,b\n")
    with pytest.warns(UserWarning, match=r"'title' is read. To read another one of \['body'\]"):
        assert text_column(data, "b.csv") == "title"


WRITERS = {
    "jsonl": lambda path, text: path.write_text(json.dumps({"text": text})),
    "json": lambda path, text: path.write_text(json.dumps([{"text": text}])),
    "txt": lambda path, text: path.write_text(text),
    "csv": lambda path, text: path.write_text(f"text\n{text}"),
    "parquet": lambda path, text: pandas.DataFrame({"text": [text]}).to_parquet(path),
}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize(
    ("stem", "alike"), [("train[1]", "train1"), ("part?", "part1"), ("a*", "ab")]
)
def test_a_name_with_signs_of_a_pattern_is_read_and_not_a_file_that_fits_it(
    ending, stem, alike, tmp_path
):
    """Alone, beside a file that fits it as a pattern, and in a folder of such a name."""
    named = tmp_path / f"{stem}.{ending}"
    WRITERS[ending](named, "right")
    assert [row["text"] for row in read_files({"train": [named]})["train"]] == ["right"]
    WRITERS[ending](tmp_path / f"{alike}.{ending}", "wrong")
    assert [row["text"] for row in read_files({"train": [named]})["train"]] == ["right"]
    for name, text in (("runs1", "wrong"), ("runs[1]", "right")):
        (tmp_path / name).mkdir()
        WRITERS[ending](tmp_path / name / f"a.{ending}", text)
    rows = read_files({"train": [tmp_path / "runs[1]" / f"a.{ending}"]})["train"]
    assert [row["text"] for row in rows] == ["right"]
