"""A row of a data set -> the turns of a conversation, as chat templates take them.

Known are the columns messages and conversations (turns with role and content, or ShareGPT's from
and value), instruction, input and output (Alpaca) with history (pairs of earlier questions and
answers), and prompt with completion; besides them system (or system_prompt) and tools. Dolly calls
the input context. Text in prompt and completion without history, system and tools is no
conversation, but text to be continued. A turn of the assistant with the weight 0 (OpenAI's) or with
train false (Axolotl's) is read and not learned. In a cell of a csv file turns are written as JSON,
or as Python writes a list.
"""

import ast
import json
import reprlib
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_THOUGHTS = ("reasoning_content", "thinking")
_KEPT = ("name", "tool_call_id", *_THOUGHTS)  # of a turn, where it has them
COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "question",
    "instruction",
    "input",
    "context",
    "output",
    "history",
    "system",
    "system_prompt",
    "tools",
)
_SYSTEM = ("system", "system_prompt")
_CONTEXT = (*_SYSTEM, "history", "tools")
_LAYOUTS = (
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
)
QUESTIONS = ("prompt", "question", "instruction", "messages", "conversations")
_NEEDED = (
    "messages (or conversations), prompt and completion, or instruction and output (with input)"
)


def is_plain(row: dict[str, Any], columns: Sequence[str]) -> bool:
    """Whether a row is text to be continued: these columns are strings, not turns."""
    return all(isinstance(as_turns(row.get(name)), str) for name in columns)


def are_plain(part: Dataset, columns: Sequence[str]) -> bool:
    """Whether the rows of a split are text to be continued: these columns of the first row are
    strings, and no row has a system message, history or tools, which only conversations hold.
    """
    context = [name for name in _CONTEXT if name in part.column_names]
    return is_plain(part[0], columns) and all(is_empty(v) for name in context for v in part[name])


def as_turns(value: Any) -> Any:
    """The turns that a string holds, as a cell of a csv file does; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[{", "{")):
        return value
    try:
        found = _parsed(value)
    except ValueError:
        return value
    turns = found if isinstance(found, list) else [found]
    is_turn = all(
        isinstance(turn, dict) and {"role", "from"} & {*turn} and {"content", "value"} & {*turn}
        for turn in turns
    )
    return found if is_turn else value


def is_empty(value: Any) -> bool:
    """Whether a value is missing, or text without a letter."""
    return not value.strip() if isinstance(value, str) else value in (None, [], {})


def conversation(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns of a row, up to the assistant's last.

    Args:
        row: by column.
        where: words for its place, for errors.

    Raises:
        ValueError: if the row has no columns of a conversation, a broken turn, or no turn of the
            assistant.
    """
    column, given = _given_turns(row, where)
    turns = up_to_answer(with_system(turns_of(given, f"{where}, column {column}"), row))
    if not turns:
        raise ValueError(
            f"{where}, column {column}: none of the {len(given)} turns is the assistant's."
        )
    return turns


def up_to_answer(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns up to the assistant's last; empty, if there is none."""
    answers = [number for number, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
    return turns[: max(answers, default=0)]


def _given_turns(row: dict[str, Any], where: str) -> tuple[str, list[Any]]:
    """The column that holds the conversation, and its turns as they are."""
    layout = next(
        (names for names in _LAYOUTS if not any(is_empty(row.get(name)) for name in names)), None
    )
    if layout is None:
        whole = [names for names in _LAYOUTS if all(name in row for name in names)]
        raise _missing(row, where, [name for names in whole for name in names], f"are {_NEEDED}")
    column = layout[-1]
    if len(layout) == 1:
        return column, _turn_list(row[column], f"{where}, column {column}")
    opening = row["prompt"] if layout[0] == "prompt" else _instruction(row, where)
    answer = answer_turns(row[column], f"{where}, column {column}")
    asked = _opening(opening, f"{where}, column {layout[0]}")
    return column, [*_earlier(row, where), *asked, *answer]


def _earlier(row: dict[str, Any], where: str) -> list[Any]:
    """The turns of the column history: pairs of a question and its answer."""
    where = f"{where}, column history"
    history = row.get("history") or []
    pairs = _loaded(history, where) if isinstance(history, str) else history
    if not isinstance(pairs, list):
        raise ValueError(f"{where}, is {pairs!r}; it must be a list of questions with answers.")
    turns = []
    for pair in pairs:
        if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
            raise ValueError(f"{where}, has {pair!r}; it must be a question and its answer.")
        turns += [*_opening(pair[0], where), *answer_turns(pair[1], where)]
    return turns


def _missing(row: dict[str, Any], where: str, columns: Sequence[str], needed: str) -> ValueError:
    """The error for a row without content in these columns; it names the first that is there."""
    empty = next((name for name in columns if name in row and is_empty(row[name])), None)
    if empty is not None:
        where = f"{where}, column {empty} is {row[empty]!r}"
    return ValueError(
        f"{where}: the columns with content are {[name for name in row if row[name]]}; needed "
        f"{needed}. Fill the row, or remove it."
    )


def question_of(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns that wait for an answer: of the columns prompt, question, instruction (with input),
    messages or conversations.

    Raises:
        ValueError: if the row has none of these columns, or a broken turn.
    """
    column = next((name for name in QUESTIONS if not is_empty(row.get(name))), None)
    if column is None:
        raise _missing(row, where, QUESTIONS, f"is one of {', '.join(QUESTIONS)}")
    given = row[column]
    if column == "instruction":
        given = _instruction(row, where)
    place = f"{where}, column {column}"
    asked = _opening(given, place)
    if column in ("prompt", "question", "instruction"):
        asked = [*_earlier(row, where), *asked]
    turns = with_system(turns_of(asked, place), row)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise ValueError(f"{where}, column {column}: there is no turn before the answer.")
    return turns


def turns_of(given: list[Any], where: str) -> list[dict[str, Any]]:
    """Turns as chat templates take them.

    Raises:
        ValueError: if one of them is broken; it names its number.
    """
    return [turn_of(turn, f"{where}, turn {index + 1}") for index, turn in enumerate(given)]


def with_system(turns: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns behind the row's system message, unless they have such a turn."""
    message = next((row[name] for name in _SYSTEM if row.get(name)), None)
    if message is None or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": message}, *turns]


def _opening(prompt: Any, where: str) -> list[Any]:
    """The turns of a prompt; text is one turn of the user."""
    prompt = as_turns(prompt)
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return _turn_list(prompt, where)


def _instruction(row: dict[str, Any], where: str) -> str:
    parts = {name: row.get(name) for name in ("instruction", "input", "context")}
    for name, part in parts.items():
        if part is not None and not isinstance(part, str):
            raise ValueError(f"{where}, column {name}, is {reprlib.repr(part)}; write it as text.")
    return "\n\n".join(part for part in parts.values() if part)


def answer_turns(completion: Any, where: str) -> list[Any]:
    """The turns of an answer; text is one turn of the assistant."""
    completion = as_turns(completion)
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return _turn_list(completion, where)


def _turn_list(given: Any, where: str) -> list[Any]:
    """Turns in a list, or in a cell; a single turn too."""
    if isinstance(given, str):
        given = _loaded(given, where)
    if isinstance(given, dict):
        return [given]
    if not isinstance(given, list):
        raise ValueError(f"{where}, is {reprlib.repr(given)}; it must be text, or a list of turns.")
    return given


def turn_of(given: Any, where: str) -> dict[str, Any]:
    """A turn with role, content and what else templates read, without empty entries.

    Raises:
        ValueError: if the role is unknown, the content is no text, or the assistant says nothing.
    """
    turn = given if isinstance(given, dict) else {}
    role = str(turn.get("role") or turn.get("from") or "").strip().lower()
    content = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls") or []
    if role == "function_call":
        calls = _loaded(content, where)
        calls = calls if isinstance(calls, list) else [calls]
        content = ""
    if isinstance(content, list):
        content = _joined(content, where)
    if content is None and calls:
        content = ""
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(
            f"{where} is {given!r}; needed are a role ({', '.join(_ROLES)}) and its content, as "
            "text."
        )
    says_nothing = is_empty(content) and not calls and not any(turn.get(name) for name in _THOUGHTS)
    if _ROLES[role] == "assistant" and says_nothing:
        raise ValueError(
            f"{where} is {given!r}, and the assistant says nothing in it; write an answer, or "
            "remove the row."
        )
    kept: dict[str, Any] = {"role": _ROLES[role], "content": content}
    kept |= {name: turn[name] for name in _KEPT if turn.get(name)}
    if turn.get("weight") not in (None, 0, 1):
        raise ValueError(f"{where} has the weight {turn['weight']!r}; it must be 0 or 1.")
    if turn.get("train") not in (None, True, False):
        raise ValueError(f"{where} has train {turn['train']!r}; it must be true or false.")
    if 0 in (turn.get("weight"), turn.get("train")):  # False is 0
        kept["weight"] = 0
    if calls:
        kept["tool_calls"] = [_call(call, where) for call in calls]
    return kept


def tools_of(row: dict[str, Any], where: str) -> list[Any] | None:
    """The tools that a row offers: descriptions of functions, also as JSON."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        tools = _loaded(tools, f"{where}, column tools")
    return tools or None


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content in parts."""
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where} has content that is no text: {parts!r}.")
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call of a tool with its arguments as a dict, which is the form that templates take."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    if "name" not in function:
        raise ValueError(f"{where} has a tool call without the name of a function: {call!r}.")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _loaded(arguments, where)
    number = {"id": call["id"]} if call.get("id") else {}  # to which the tool's answer refers
    kept = {"name": function["name"], "arguments": arguments}
    return number | {"type": "function", "function": kept}


def _loaded(text: Any, where: str) -> Any:
    try:
        return _parsed(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is not JSON: {text!r}.") from error


def _parsed(text: str) -> Any:
    """The value of JSON, or of a list as Python writes it, which pandas puts into csv files."""
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise error from None
