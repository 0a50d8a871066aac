"""A recipe: the options of a command in a YAML file, by their names on the command line.

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    dataset: chat.jsonl
    out: tuned
    task: sft
    rank: 60
    max-length: 512

`qrefta finetune recipe.yaml` runs it; options behind the file replace its values. Paths are
relative to the folder in which the command runs. A run writes its recipe into its folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml
from typer.core import TyperCommand

NAME = "recipe.yaml"
_SUFFIXES = (".yaml", ".yml")


class Command(Protocol):
    """A command of typer's, with its parameters."""

    params: list[Any]


class RecipeCommand(TyperCommand):
    """A command whose first argument may be a recipe instead of its arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and Path(args[0]).suffix in _SUFFIXES:
            given = read_recipe(Path(args[0]), self)
            arguments = [found.name for found in self.params if found.param_type_name == "argument"]
            missing = [name for name in arguments if name not in given]
            if missing:
                raise ValueError(
                    f"{args[0]} has no {' and no '.join(map(str, missing))}; a recipe needs "
                    f"{', '.join(map(str, arguments))}"
                )
            args = [*(str(given.pop(name)) for name in arguments), *args[1:]]
            ctx.default_map = given
        return super().parse_args(ctx, args)


def read_recipe(file: Path, command: Command) -> dict[str, Any]:
    """The values of a recipe, by the names of the command's parameters.

    Raises:
        ValueError: if the file is missing or no mapping, a name is no option of the command, or
            two names are of the same option.
    """
    if not file.is_file():
        raise ValueError(f"There is no recipe {file}; give a YAML file, or MODEL, DATA and OUT")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {type(content).__name__}; a recipe has lines `name: value`")
    names = {}
    for parameter in command.params:
        for option in (str(parameter.name), *parameter.opts):
            names[_plain(option)] = parameter
    values: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for name, value in content.items():
        if _plain(str(name)) not in names:
            allowed = ", ".join(sorted({_plain(str(known)) for known in names}))
            raise ValueError(f"{file} has {name!r}, which is no option; the options are {allowed}")
        option = names[_plain(str(name))]
        if option.name in written:
            raise ValueError(
                f"{file} has {written[option.name]!r} and {name!r}, which are the same option; "
                "remove one"
            )
        written[option.name] = name
        if value is not None:
            several = getattr(option, "multiple", False) and not isinstance(value, list)
            values[option.name] = [value] if several else value
    return values


def write_recipe(folder: Path, command: Command, values: Mapping[str, Any]) -> None:
    """Write the values of a command's parameters into a folder, as a recipe that repeats the run.

    Args:
        folder: of the run.
        command: that ran.
        values: by parameter. None and options that are not listed are left out, and `resume`, which
            belongs to a single call.
    """
    kept = {}
    for parameter in command.params:
        value = values.get(str(parameter.name))
        hidden = getattr(parameter, "hidden", False)
        if value is None or value == () or hidden or parameter.name in ("resume", "help"):
            continue
        name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else None
        kept[_plain(name or str(parameter.name))] = _simple(value)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    (folder / NAME).write_text(text, encoding="utf-8")


def _plain(name: str) -> str:
    """max_length, --max-length -> max-length."""
    return name.lstrip("-").replace("_", "-")


def _simple(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_simple(one) for one in value]
    return value if isinstance(value, bool | int | float) else str(value)
