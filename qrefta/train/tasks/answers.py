"""A conversation -> its token ids, and which of them are the assistant's.

Where the chat template marks the assistant's turns itself (`{% generation %}`), its mark is used;
else they are found in the text (`answer_spans`).
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from qrefta.choices import Loss
from qrefta.nn.head_loss import IGNORED
from qrefta.train.tasks.answer_spans import answer_spans
from qrefta.train.tasks.template import ChatTemplate, encoded


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
        ids, offsets = encoded(text, tokenizer, add_special_tokens=True)
        mask = _inside(offsets, [(len(row["prompt"]), len(text))])
    else:
        ids, mask = _conversation(row, tokenizer, loss, max_length)
    labels = [token if learned else IGNORED for token, learned in zip(ids, mask)]
    return {"input_ids": ids, "labels": labels}


def left_out(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the assistant's turns that the chat template does not mark as such, if it marks.

    Args:
        row: with messages and, optionally, tools.
        tokenizer: of the model.
    """
    template = ChatTemplate(tokenizer, row.get("tools"))
    if not template.marks_answers:
        return ""
    ids, marked = template.marked(row["messages"])
    text, spans = answer_spans(row["messages"], template)
    found = _inside(encoded(text, tokenizer)[1], spans)
    left = [token for token, one, other in zip(ids, found, marked) if one and not other]
    return str(tokenizer.decode(left))


def _conversation(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    loss: Loss,
    max_length: int | None,
) -> tuple[list[int], list[bool]]:
    turns = row["messages"]
    template = ChatTemplate(tokenizer, row.get("tools"))
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    learned = [turn.get("weight") != 0 for turn in answers]
    if template.marks_answers and loss == "all" and all(learned):
        return template.marked(turns)
    ids, offsets = encoded(template.text(turns), tokenizer)
    last = None
    if max_length is not None and len(ids) > max_length:
        last = offsets[max_length][0]
    _, spans = answer_spans(turns, template, last)
    first = 0 if loss == "all" else len(answers) - 1
    mask = _inside(offsets, [span for span, one in [*zip(spans, learned)][first:] if one])
    if template.marks_answers:
        _, marked = template.marked(turns)
        mask = [one and other for one, other in zip(mask, marked)]
    return ids, mask


def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each token has characters within one of the spans."""
    return [
        any(first < end and start < last for start, end in spans) and first < last
        for first, last in offsets
    ]
