"""The encoding of a text file. Torch-free."""

import json
from pathlib import Path

_SHOWN = 30  # bytes around a byte that is no text, in an error


def text_encoding(path: str | Path) -> str:
    """UTF-8, or UTF-16 or UTF-32 if the first four bytes show one of them.

    A byte-order mark is not a part of the text. Encodings of one byte a character, such as cp1252,
    cannot be told apart, so they are not guessed: `check_text` refuses them.
    """
    with Path(path).open("rb") as file:
        found = json.detect_encoding(file.read(4))
    return "utf-8-sig" if found == "utf-8" else found


def check_text(path: str | Path) -> None:
    """Raise ValueError for a file that is not text in its encoding; it names line, byte and fix."""
    encoding = text_encoding(path)
    if encoding != "utf-8-sig":
        _decode(Path(path).read_bytes(), encoding, str(path), "")
        return
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            _decode(line, "utf-8", str(path), f"line {number}, ")


def _decode(content: bytes, encoding: str, path: str, place: str) -> None:
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        start = max(0, error.start - _SHOWN)
        shown = content[start : error.start + _SHOWN].decode("ascii", "backslashreplace").strip()
        raise ValueError(
            f"{path} is not text in {encoding.upper()}: {place}byte "
            f"0x{content[error.start]:02x} in '{shown}'. Save the file as UTF-8 (in Excel: CSV "
            "UTF-8), or convert it from the encoding that it has: iconv -f cp1252 -t utf-8 OLD > "
            "NEW"
        ) from error
