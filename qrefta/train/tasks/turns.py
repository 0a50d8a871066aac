"""A row of a data set -> the turns of a conversation, as chat templates take them.

Known are the columns messages and conversations (turns with role and content, or ShareGPT's from
and value), instruction, input and output (Alpaca), and prompt with completion; besides them system
and tools.
"""

import json
from typing import Any

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
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")  # of a turn, where it has them
_COLUMNS = (
    "messages (or conversations), prompt and completion, or instruction and output (with input)"
)


def is_plain(row: dict[str, Any]) -> bool:
    """Whether a row is text to be continued: prompt and completion are strings."""
    return isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)


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
    turns = with_system(turns_of(given, f"{where}, column {column}"), row)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise ValueError(
            f"{where}, column {column}: none of the {len(given)} turns is the assistant's."
        )
    return turns


def _given_turns(row: dict[str, Any], where: str) -> tuple[str, list[Any]]:
    """The column that holds the conversation, and its turns as they are."""
    if row.get("prompt") and row.get("completion"):
        return "completion", [*_opening(row["prompt"]), *_answer(row["completion"])]
    for column in ("messages", "conversations"):
        turns = row.get(column)
        if isinstance(turns, list) and turns:
            return column, turns
    if row.get("instruction") and row.get("output"):
        return "output", [*_opening(_instruction(row)), *_answer(row["output"])]
    raise ValueError(
        f"{where}: the columns with content are {[name for name in row if row[name]]}; needed are "
        f"{_COLUMNS}."
    )


def question_of(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns that wait for an answer: of the columns prompt, question, instruction (with input),
    messages or conversations.

    Raises:
        ValueError: if the row has none of these columns, or a broken turn.
    """
    columns = ("prompt", "question", "instruction", "messages", "conversations")
    column = next((name for name in columns if row.get(name)), None)
    if column is None:
        raise ValueError(
            f"{where}: the columns with content are {[name for name in row if row[name]]}; needed "
            f"is one of {', '.join(columns)}."
        )
    given = row[column]
    if column == "instruction":
        given = _instruction(row)
    turns = with_system(turns_of(_opening(given), f"{where}, column {column}"), row)
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
    """The turns behind the content of the row's column system, unless they have such a turn."""
    if not row.get("system") or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": row["system"]}, *turns]


def _opening(prompt: str | list[Any]) -> list[Any]:
    """The turns of a prompt; text is one turn of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _instruction(row: dict[str, Any]) -> str:
    return "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)


def _answer(completion: str | list[Any]) -> list[Any]:
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return completion


def turn_of(given: Any, where: str) -> dict[str, Any]:
    """A turn with role, content and what else templates read, without empty entries.

    Raises:
        ValueError: if the role is unknown, or the content is no text.
    """
    turn = given if isinstance(given, dict) else {}
    role = turn.get("role") or turn.get("from")
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
            f"{where} is {given!r}; needed are a role ({', '.join(_ROLES)}) and its content."
        )
    kept: dict[str, Any] = {"role": _ROLES[role], "content": content}
    kept |= {name: turn[name] for name in _KEPT if turn.get(name)}
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
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _loaded(text: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is not JSON: {text!r}.") from error
