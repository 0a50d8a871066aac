"""A column of labels -> classes: their names, and the index of each row's class."""

import ast
import math
import re
import unicodedata
import warnings
from contextlib import suppress
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict

_GAPS = ("na", "n/a", "#n/a", "<na>", "nan", "null", "none")  # in a column of numbers
_WHOLE = re.compile(r"^(-?\d+)\.0*$")
_LISTED = re.compile(r"\s*\[.*\]\s*$", re.DOTALL)
_SEVERAL = re.compile("[;,|]")
_MOST = 1000
_SHOWN = 5
_NEEDED = f"Labels must be 2 to {_MOST} classes without gaps"


def encode_labels(parts: DatasetDict, source: str, column: str) -> DatasetDict:
    """The column label as one `ClassLabel` for all splits, with the classes of the training split.

    Classes are words, whole numbers or truth values; they are named as text, without white space
    around it. Whole numbers are in numerical order, other names in alphabetical order.

    Args:
        parts: with the column label.
        source: name of the data, for errors.
        column: name of the label column in the source, for errors.

    Raises:
        ValueError: if a row of any split has no label, several labels or a number that is not
            whole, there is one class or more than 1000, or a label of another split is no class.
    """
    values = {}
    names = {}
    for split, part in parts.items():
        place = f"{source} ({split}), column {column}"
        values[split] = _values(part)
        _check_gaps(values[split], place)
        names[split] = [_name(value, f"{place}, row {row}") for row, value in _rows(values[split])]
    feature = parts["train"].features["label"]
    if isinstance(feature, ClassLabel):
        classes = list(feature.names)
    else:
        names, classes = _classes(names, f"{source} (train), column {column}")
    for split, part in zip(names, parts.values()):
        _check_known(names[split], values[split], classes, f"{source} ({split})", split)
        encoded = list(map({name: index for index, name in enumerate(classes)}.get, names[split]))
        # with its feature, since a cast would copy the other columns, such as images
        kind = ClassLabel(names=classes)
        parts[split] = part.remove_columns("label").add_column("label", encoded, feature=kind)
    return parts


def _rows(values: list[Any]) -> enumerate:
    return enumerate(values, 1)


def _values(part: Dataset) -> list[Any]:
    """The labels of a split; the names of the classes, where the column has them."""
    feature = part.features["label"]
    values = list(part["label"])
    if not isinstance(feature, ClassLabel):
        return values
    known = dict(enumerate(feature.names))
    return [known.get(value) for value in values]


def _check_gaps(values: list[Any], place: str) -> None:
    """Refuse rows without a label."""
    gaps = [(row, value) for row, value in _rows(values) if _is_gap(value)]
    if gaps:
        raise _unlabelled(gaps, len(values), place)


def _unlabelled(gaps: list[tuple[int, Any]], count: int, place: str) -> ValueError:
    row, value = gaps[0]
    return ValueError(
        f"{_NEEDED}; {place}, row {row}, has no label but {value!r} ({len(gaps)} of {count} rows). "
        "Label these rows or remove them."
    )


def _is_gap(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _name(value: Any, place: str) -> str:
    several = isinstance(value, list | dict)
    if isinstance(value, str) and _LISTED.match(value):  # a list in a csv cell
        with suppress(SyntaxError, ValueError):
            several = isinstance(ast.literal_eval(value.strip()), list)
    if several:
        raise ValueError(
            f"{_NEEDED}; {place}, has {value!r}. A row has one label, a word or a whole number: "
            "several labels a row cannot be trained; give one column a question."
        )
    return str(value).strip()


def _classes(names: dict[str, list[str]], place: str) -> tuple[dict[str, list[str]], list[str]]:
    """The names of the classes of all rows, and the classes in order."""
    found = set(names["train"])
    words = {name for name in found if _number(name) is None}
    if len(words) < len(found) and all(word.lower() in _GAPS for word in words):
        gaps = [(row, name) for row, name in _rows(names["train"]) if name in words]
        if gaps:
            raise _unlabelled(gaps, len(names["train"]), place)
        names = {split: [_WHOLE.sub(r"\1", name) for name in part] for split, part in names.items()}
        found = set(names["train"])
    broken = sorted(name for name in found if not words and not float(name).is_integer())
    if broken:
        raise ValueError(
            f"{_NEEDED}; {place}, has the number {broken[0]}. Numbers that are not whole cannot be "
            "trained as classes; name the classes by words, or by whole numbers."
        )
    if not 2 <= len(found) <= _MOST:
        raise ValueError(
            f"{_NEEDED}; {place}, has {len(found)} in {len(names['train'])} rows, such as "
            f"{sorted(found)[:_SHOWN]}. Give rows of other classes, or name the column of labels."
        )
    classes = sorted(found) if words else sorted(found, key=lambda name: (float(name), name))
    _warn(names["train"], classes, place)
    return names, classes


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _warn(names: list[str], classes: list[str], place: str) -> None:
    """Warn of classes that may be none."""
    if "-1" in classes and not any(_number(name) is None for name in classes):
        warnings.warn(
            f"{place}: -1 is a class like {classes[1]} ({names.count('-1')} of {len(names)} rows). "
            "If it marks rows without a label, remove them.",
            stacklevel=5,
        )
    by_letters: dict[str, list[str]] = {}
    for name in classes:
        # One letter may have several forms in Unicode, which look alike.
        letters = unicodedata.normalize("NFKC", name).casefold()
        # Several labels in a cell, such as a;b, mean the same in any order.
        letters = ";".join(sorted(part.strip() for part in _SEVERAL.split(letters)))
        by_letters.setdefault(letters, []).append(name)
    alike = next((group for group in by_letters.values() if len(group) > 1), None)
    if alike is not None:
        warnings.warn(
            f"{place}: {alike} are different classes. If they are the same, spell them alike.",
            stacklevel=5,
        )


def _check_known(
    names: list[str], values: list[Any], classes: list[str], place: str, split: str
) -> None:
    """Refuse labels of a split that training does not have."""
    unknown = [row for row, name in _rows(names) if name not in classes]
    if unknown:
        raw = list(dict.fromkeys(values[row - 1] for row in unknown))[:_SHOWN]
        raise ValueError(
            f"The {split} split has labels {raw} that are no class of training: {classes}. "
            f"{place}, row {unknown[0]}, is the first of {len(unknown)} such rows; remove them, or "
            "add rows of these classes to the train split."
        )
