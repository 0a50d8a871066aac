"""Where the assistant's turns stand in the text of a conversation.

A chat template is a program: it may move, trim or leave out parts, depending on what follows them.
So a turn is found by its place in the finished text. The conversation is rendered once more with a
placeholder as the turn's content. Before the placeholder stands the generation prompt, after which
the model speaks; after it stands what the template puts at the end of the turn, which is known from
the conversation cut off there.
"""

from qrefta.train.tasks.template import ChatTemplate, Turns

_PLACEHOLDER = "PlaceOfTheAnswer"


def answer_spans(
    turns: Turns, template: ChatTemplate, last: int | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and start and end of each of the assistant's turns in it.

    A turn starts after the generation prompt, and ends with what ends it in the finished text.

    Args:
        turns: of the conversation.
        template: of the model's tokenizer.
        last: a place in the text, behind which no turns are looked for; None: the end.

    Raises:
        ValueError: if the template leaves a turn out, or renders what follows differently.
    """
    text = template.text(turns)
    spans: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        floor = spans[-1][1] if spans else 0
        if last is not None and floor >= last:
            break
        forms = _with_placeholder(turns, index)
        search = _Search(template, text, index, floor, turns[:index])
        span = next((span for span in map(search.span, forms) if span is not None), None)
        # the last form is the tool call's, which must be shown too
        if span is None or (len(forms) > 1 and _PLACEHOLDER not in template.text(forms[-1])):
            raise ValueError(
                f"The chat template does not show turn {index + 1} of a conversation as a part of "
                f"its text, so the turn cannot be learned: {turn!r}."
            )
        spans.append(span)
    return text, spans


class _Search:
    """The search for one turn of the assistant.

    Args:
        template: of the conversation.
        text: of the conversation.
        index: of the turn.
        floor: end of the assistant's turn before it, in the text.
        before: the turns before it.
    """

    def __init__(
        self, template: ChatTemplate, text: str, index: int, floor: int, before: Turns
    ) -> None:
        self._template = template
        self._text = text
        self._index = index
        self._floor = floor
        self._opening = template.opening(before)

    def span(self, replaced: Turns) -> tuple[int, int] | None:
        """Start and end of the turn; None if the placeholder is not shown, or out of place.

        Args:
            replaced: the conversation with a placeholder in the turn.
        """
        before, shown, after = self._template.text(replaced).partition(_PLACEHOLDER)
        if not shown:
            return None
        start = self._start(before)
        if self._index + 1 == len(replaced):
            end, following = len(self._text), ""
        else:
            end, following = self._end(replaced, after)
        in_place = self._text[:start] == before[:start] and self._text[end:] == following
        return (start, end) if in_place and start <= end else None

    def _start(self, before: str) -> int:
        """The place behind the generation prompt, in the text before the placeholder."""
        prompt, head = self._opening
        common = self._template.common
        place = before.rfind(prompt, self._floor) if prompt else -1
        start = len(before)
        if place >= 0:
            start = place + len(prompt)
        elif prompt and common(head, before) > len(head) - len(prompt):
            start = common(head, before)  # the turn begins as a part of the prompt
        shared = common(self._text, before)
        if shared > place >= 0:
            start = min(start, shared)  # an empty thought that this turn does not have
        return start

    def _end(self, replaced: Turns, after: str) -> tuple[int, str]:
        """The end of the turn, and the text that follows it.

        Before further turns the template may end this one as before a generation prompt.
        """
        prompt, head = self._template.opening(replaced[: self._index + 1])
        ending = head.removesuffix(prompt).partition(_PLACEHOLDER)[2]
        following = after[self._template.common(after, ending) :]
        return len(self._text) - len(following), following


def _with_placeholder(turns: Turns, index: int) -> list[Turns]:
    """The conversation with a placeholder in one turn: as its content, or in its tool call.

    Some templates leave out the content of a turn with tool calls, or move it.
    """
    turn = turns[index]
    forms = (
        [turn | {"content": _PLACEHOLDER}] if turn["content"] or "tool_calls" not in turn else []
    )
    if "tool_calls" in turn:
        first, *others = turn["tool_calls"]
        function = first["function"] | {"arguments": {_PLACEHOLDER: 0}}
        forms.append(turn | {"tool_calls": [first | {"function": function}, *others]})
    return [[*turns[:index], form, *turns[index + 1 :]] for form in forms]
