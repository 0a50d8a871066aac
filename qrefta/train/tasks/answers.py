"""A conversation -> its token ids, and which of them are the assistant's.

A chat template is a program: it may move, trim or leave out parts, depending on what follows them.
So a turn is found by its place in the finished text. The conversation is rendered once more with a
placeholder as the turn's content. Before the placeholder stands the generation prompt, after which
the model speaks; after it stands what the template puts at the end of the turn, which is known from
the conversation cut off there. Where the template marks the assistant's turns itself
(`{% generation %}`), its mark is used.
"""

import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qrefta.choices import Loss
from qrefta.nn.head_loss import IGNORED

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "PlaceOfTheAnswer"


def learned_ids(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    loss: Loss,
    max_length: int | None = None,
) -> dict[str, list[int]]:
    """The token ids of a row, and labels that are IGNORED outside the assistant's turns.

    Args:
        row: with prompt and completion as strings, or with messages and, optionally, tools.
        tokenizer: of the model, with a chat template for messages.
        loss: all: every turn of the assistant; last: its last turn. Turns with the weight 0 are
            not learned.
        max_length: tokens behind which turns are not looked for; None: all are.

    Raises:
        ValueError: if the template does not show an answer, or the tokenizer has no offsets.
        TemplateError: if the template does not take the conversation; see `template_errors`.
    """
    if "completion" in row:
        text = row["prompt"] + row["completion"]
        end = tokenizer.eos_token or ""
        if not row["completion"].endswith(end):
            text += end
        ids, offsets = _encoded(text, tokenizer, add_special_tokens=True)
        mask = _inside(offsets, [(len(row["prompt"]), len(text))])
    else:
        ids, mask = _conversation(row, tokenizer, loss, max_length)
    labels = [token if learned else IGNORED for token, learned in zip(ids, mask)]
    return {"input_ids": ids, "labels": labels}


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


def marks_answers(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None = None) -> bool:
    """Whether the chat template marks the assistant's turns."""
    template = tokenizer.get_chat_template(None, list(tools) if tools else None)
    return _GENERATION.search(template) is not None


def left_out(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the assistant's turns that the chat template does not mark as such, if it marks.

    Args:
        row: with messages and, optionally, tools.
        tokenizer: of the model.
    """
    messages, tools = row["messages"], row.get("tools")
    if not marks_answers(tokenizer, tools):
        return ""
    ids, marked = _marked(messages, tools, tokenizer)
    text, spans = answer_spans(messages, tools, tokenizer)
    found = _inside(_encoded(text, tokenizer)[1], spans)
    left = [token for token, one, other in zip(ids, found, marked) if one and not other]
    return str(tokenizer.decode(left))


def _conversation(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    loss: Loss,
    max_length: int | None,
) -> tuple[list[int], list[bool]]:
    messages, tools = row["messages"], row.get("tools")
    has_marks = marks_answers(tokenizer, tools)
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    learned = [turn.get("weight") != 0 for turn in answers]
    if has_marks and loss == "all" and all(learned):
        return _marked(messages, tools, tokenizer)
    ids, offsets = _encoded(_shown(messages, tools, tokenizer), tokenizer)
    last = None
    if max_length is not None and len(ids) > max_length:
        last = offsets[max_length][0]
    _, spans = answer_spans(messages, tools, tokenizer, last)
    first = 0 if loss == "all" else len(answers) - 1
    mask = _inside(offsets, [span for span, one in [*zip(spans, learned)][first:] if one])
    if has_marks:
        _, marked = _marked(messages, tools, tokenizer)
        mask = [one and other for one, other in zip(mask, marked)]
    return ids, mask


def _marked(
    messages: list[dict[str, Any]], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Token ids, and the template's own mark of the assistant's."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]


def _shown(
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: bool = False,
) -> str:
    """The text of turns, with the generation prompt behind them if asked."""
    text: Any = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
    )
    return text


def answer_spans(
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    last: int | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and start and end of each of the assistant's turns in it.

    A turn starts after the generation prompt, and ends with what ends it in the finished text.

    Args:
        messages: turns.
        tools: that the conversation offers, or None.
        tokenizer: with a chat template.
        last: a place in the text, behind which no turns are looked for; None: the end.

    Raises:
        ValueError: if the template leaves a turn out, or renders what follows differently.
    """

    def render(turns: list[dict[str, Any]], prompt: bool = False) -> str:
        return _shown(turns, tools, tokenizer, prompt)

    def common(one: str, other: str) -> int:
        """The length of the part that both begin with, without a part of a token."""
        length = _common_length(one, other)
        if length == len(one) or length == len(other):
            return length
        _, offsets = _encoded(one, tokenizer)
        return next((start for start, end in offsets if start < length < end), length)

    text = render(messages)
    spans = []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        floor = spans[-1][1] if spans else 0
        if last is not None and floor >= last:
            break
        forms = _with_placeholder(messages, index)
        opening = _generation_prompt(messages[:index], render, common)
        found = (_span(text, replaced, index, floor, opening, render, common) for replaced in forms)
        span = next((span for span in found if span is not None), None)
        # the last form is the tool call's, which must be shown too
        if span is None or (len(forms) > 1 and _PLACEHOLDER not in render(forms[-1])):
            raise ValueError(
                f"The chat template does not show turn {index + 1} of a conversation as a part of "
                f"its text, so the turn cannot be learned: {turn!r}."
            )
        spans.append(span)
    return text, spans


def _span(
    text: str,
    replaced: list[dict[str, Any]],
    index: int,
    floor: int,
    opening: tuple[str, str],
    render: Any,
    common: Any,
) -> tuple[int, int] | None:
    """Start and end of a turn; None if the placeholder is not shown, or shown out of place.

    Args:
        text: of the conversation.
        replaced: the conversation with a placeholder in the turn.
        index: of the turn.
        floor: end of the assistant's turn before it.
        opening: the generation prompt before the turn, and all that stands before the answer.
        render: turns, and whether to add the generation prompt, to a text.
        common: two texts to the length of what both begin with.
    """
    before, shown, after = render(replaced).partition(_PLACEHOLDER)
    if not shown:
        return None
    prompt, head = opening
    place = before.rfind(prompt, floor) if prompt else -1
    start = len(before)
    if place >= 0:
        start = place + len(prompt)
    elif prompt and common(head, before) > len(head) - len(prompt):
        start = common(head, before)  # the turn begins as a part of the prompt
    if common(text, before) > place >= 0:
        start = min(start, common(text, before))  # an empty thought that this turn does not have
    if index + 1 == len(replaced):
        return (start, len(text)) if text[:start] == before[:start] else None
    # Before further turns the template may end this one as before a generation prompt.
    prompt, head = _generation_prompt(replaced[: index + 1], render, common)
    ending = head.removesuffix(prompt).partition(_PLACEHOLDER)[2]
    following = after[common(after, ending) :]
    end = len(text) - len(following)
    in_place = text[:start] == before[:start] and text[end:] == following
    return (start, end) if in_place and start <= end else None


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


def _with_placeholder(messages: list[dict[str, Any]], index: int) -> list[list[dict[str, Any]]]:
    """The conversation with a placeholder in one turn: as its content, or in its tool call.

    Some templates leave out the content of a turn with tool calls, or move it.
    """
    turn = messages[index]
    forms = (
        [turn | {"content": _PLACEHOLDER}] if turn["content"] or "tool_calls" not in turn else []
    )
    if "tool_calls" in turn:
        first, *others = turn["tool_calls"]
        function = first["function"] | {"arguments": {_PLACEHOLDER: 0}}
        forms.append(turn | {"tool_calls": [first | {"function": function}, *others]})
    return [[*messages[:index], form, *messages[index + 1 :]] for form in forms]


def _generation_prompt(turns: list[dict[str, Any]], render: Any, common: Any) -> tuple[str, str]:
    """The generation prompt after some turns, and these turns with it; empty, if there is none."""
    try:
        without = render(turns)
        head = render(turns, True)
    except TemplateError:  # no conversation begins with the assistant, for this template
        return "", ""
    return head[common(head, without) :], head


def _encoded(
    text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and start and end of each token in the text."""
    try:
        encoded: Any = tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
        )
    except NotImplementedError as error:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where tokens lie in the text; load a "
            "tokenizer with a tokenizer.json."
        ) from error
    return encoded["input_ids"], encoded["offset_mapping"]


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token has characters within one of the spans."""
    return [
        any(first < end and start < last for start, end in spans) and first < last
        for first, last in offsets
    ]
