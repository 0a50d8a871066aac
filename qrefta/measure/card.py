"""A section of the model card: how much of the base model is kept."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError  # raised by ModelCard; huggingface-hub installs it

from qrefta.files.whole_file import remove_temporary_files, replace_text
from qrefta.measure.compare import TextComparison
from qrefta.model_card import NAME

_START = "<!-- kept of the base model -->"
_END = "<!-- end of kept of the base model -->"


def check_card(folder: str | Path) -> None:
    """Refuse a folder without a model card that qrefta wrote.

    Raises:
        ValueError: if there is no README.md, or its header does not have the tag qrefta.
    """
    file = Path(folder) / NAME
    tags = None
    if file.is_file():
        with suppress(ValueError, YAMLError):  # a damaged header
            tags = ModelCard.load(file).data.to_dict().get("tags")
    if "qrefta" not in (tags or []):
        raise ValueError(
            f"{folder} has no model card by qrefta; needed is a {NAME} whose header has the tag "
            "qrefta, as prepare, finetune, merge and export-lora write it."
        )


def write_comparison(folder: str | Path, comparisons: Sequence[TextComparison]) -> None:
    """Add a section with these comparisons to the card of a model, or replace the section.

    Two comments mark the section. All other text stays as it is, byte by byte, and the file is
    written whole or not at all. No other process may be writing to the folder.

    Args:
        folder: of the model, with a card that qrefta wrote.
        comparisons: of the model with one reference, one entry a text.

    Raises:
        ValueError: if the folder has no such card, a comparison has no reference, or one of the two
            comments is missing in the card.
    """
    check_card(folder)
    remove_temporary_files(Path(folder))
    file = Path(folder) / NAME
    card = file.read_bytes().decode()
    replace_text(file, _with_section(card, _section(comparisons), file))


def _with_section(card: str, section: str, file: Path) -> str:
    """The card with the section in place of the old one, or at its end."""
    before, start, rest = card.partition(_START)
    old, end, after = rest.partition(_END)
    if start and end and _START not in old + after and _END not in before + after:
        return before + section + after
    if _START in card or _END in card:
        raise ValueError(
            f"{file} does not have one {_START} followed by one {_END}; remove both comments and "
            "the section between them."
        )
    return f"{card.rstrip()}\n\n{section}\n"


def _section(comparisons: Sequence[TextComparison]) -> str:
    """The section, Markdown, between its two comments."""
    references = {comparison.reference for comparison in comparisons}
    if len(references) != 1 or None in references:
        names = ", ".join(sorted(map(str, references))) or "no comparison"
        raise ValueError(
            f"The card shows comparisons with one reference; given are comparisons with {names}."
        )
    first = comparisons[0]
    return "\n\n".join(
        [
            f"{_START}\n## Kept of the base model",
            f"Compared with {first.reference} on texts, in windows of {first.window} tokens. The "
            "KL divergence is KL(reference || model) of the distributions of the next token, in "
            "nats: its mean and quantiles over tokens. A flip is a token for which exactly one of "
            "the two models has the true token as top-1. ± is one standard error, with windows as "
            "the unit of sampling.",
            _table(comparisons),
            _END,
        ]
    )


def _table(comparisons: Sequence[TextComparison]) -> str:
    """One row a text."""
    names = ["text", *comparisons[0].to_text()]
    rows = [names, ["---"] * len(names)]
    for comparison in comparisons:
        rows.append([comparison.text.replace("|", "&#124;"), *comparison.to_text().values()])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
