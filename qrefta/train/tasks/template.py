"""`ChatTemplate`: turns -> text and token ids, as a tokenizer's chat template shows them."""

import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Turns = list[dict[str, Any]]


class Opening(NamedTuple):
    """How the assistant's turn opens after some turns.

    Attributes:
        prompt: the generation prompt; empty, if there is none.
        text: of the turns with it; empty, if there is none.
    """

    prompt: str
    text: str


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with the tools that a conversation offers.

    Its methods raise TemplateError where the template does not take the turns.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None = None

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks the assistant's turns (`{% generation %}`)."""
        template = self.tokenizer.get_chat_template(None, self.tools or None)
        return _GENERATION.search(template) is not None

    def text(self, turns: Turns, prompt: bool = False) -> str:
        """The text of turns, with the generation prompt behind them if asked."""
        text: Any = self.tokenizer.apply_chat_template(
            turns, tools=self.tools, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def marked(self, turns: Turns) -> tuple[list[int], list[bool]]:
        """Token ids of turns, and the template's mark of the assistant's."""
        encoded: Any = self.tokenizer.apply_chat_template(
            turns, tools=self.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]

    def opening(self, turns: Turns) -> Opening:
        """How the assistant's turn opens after these turns."""
        try:
            without = self.text(turns)
            text = self.text(turns, prompt=True)
        except TemplateError:  # no conversation begins with the assistant, for this template
            return Opening("", "")
        return Opening(text[self.common(text, without) :], text)

    def common(self, one: str, other: str) -> int:
        """The length of the part that two texts begin with, without a part of a token of `one`."""
        length = _common_length(one, other)
        if length == len(one) or length == len(other):
            return length
        _, offsets = encoded(one, self.tokenizer)
        return next((start for start, end in offsets if start < length < end), length)


@contextmanager
def template_errors(where: str, row: dict[str, Any]) -> Iterator[None]:
    """Within this context a template that does not take a row is a ValueError, with its words."""
    try:
        yield
    except TemplateError as error:
        raise ValueError(
            f"{where}: the chat template does not take the conversation: {error}. Change or remove "
            f"the row, {reprlib.repr(row)}, or give a tokenizer with another chat template."
        ) from error


def encoded(
    text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and start and end of each token in the text.

    Raises:
        ValueError: if the tokenizer has no offsets.
    """
    try:
        found: Any = tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
        )
    except NotImplementedError as error:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where tokens lie in the text; load a "
            "tokenizer with a tokenizer.json."
        ) from error
    return found["input_ids"], found["offset_mapping"]


def _common_length(one: str, other: str) -> int:
    """The length of the part that both begin with, by bisection."""
    same = 0
    beyond = min(len(one), len(other)) + 1
    while beyond - same > 1:
        middle = (same + beyond) // 2
        if one.startswith(other[same:middle], same):
            same = middle
        else:
            beyond = middle
    return same
