"""Arguments and options that several commands share; the settings of `prepare` among them, which
are made from the fields of `qrefta.Settings`.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qrefta.choices import AUTO_RANK, SELECTIVE, Selective
from qrefta.config.rank import parse_rank
from qrefta.config.settings import Settings

Folder = Annotated[Path, typer.Argument(help="Folder of a prepared model.")]
NewFolder = Annotated[Path, typer.Argument(help="Folder to write: new or empty.")]
LanguageModel = Annotated[
    str,
    typer.Argument(
        help="Language model: folder, hub name or .gguf file; prepared, merged or plain."
    ),
]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        help="Batch to compare logits on: a safetensors file of its tensors by name; default: text "
        "or random inputs, made from the model's config."
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(help="Largest relative difference of logits; default: room for rounding."),
]

# Values of --gradient-checkpointing; YAML reads on and off as true and false.
_CHECKPOINTING: dict[str, bool | Selective] = {
    "off": False,
    "on": True,
    SELECTIVE: SELECTIVE,
    "false": False,
    "true": True,
}
CHECKPOINTING = "[off|on|selective]"

# Fields whose option has another type or name than the field.
_SPECIAL: dict[str, tuple[Any, Any, str]] = {
    "bits": (str, str(Settings.bits), "--bits"),
    "rank": (str, AUTO_RANK, "--rank"),
    "target_modules": (list[str] | None, None, "--target"),
    "modules_to_save": (list[str] | None, None, "--modules-to-save"),
}
_REGEX = "target_regex"
_PANEL = "Preparing a dense model"
# Options of qrefta 0.1 that chose the rank: their type, and the text of --rank that replaces them.
_OLD_OPTIONS: dict[str, tuple[type, str]] = {
    "ranks": (str, "{}"),
    "trained_params": (int, "parameters={}"),
    "budget_mb": (float, "bytes={}"),
    "error_ratio": (float, "error={}"),
}


class CheckpointingCommand(TyperCommand):
    """A command that takes --gradient-checkpointing without a value for "on"."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        plain: list[str] = []
        for word, following in zip_longest(args, args[1:]):
            if word == "--no-gradient-checkpointing":
                word = "--gradient-checkpointing=off"
            elif word == "--gradient-checkpointing" and following not in _CHECKPOINTING:
                word = "--gradient-checkpointing=on"
            plain.append(word)
        return super().parse_args(ctx, plain)


def parse_checkpointing(text: str) -> bool | Selective:
    """The value of the setting `gradient_checkpointing` for the text of its option.

    Raises:
        ValueError: for other texts than off, on, selective, true and false.
    """
    value = text.lower()
    if value not in _CHECKPOINTING:
        raise ValueError(f"--gradient-checkpointing is {text!r}; it must be off, on or {SELECTIVE}")
    return _CHECKPOINTING[value]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command with one option for every setting; it receives them as the dict `settings`."""
    signature = inspect.signature(command)
    kept = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
    added = [*_setting_options(), _regex_option(), *_old_options()]

    @wraps(command)
    def with_options(**values: Any) -> None:
        chosen = {option.name: values.pop(option.name) for option in added}
        command(**values, settings=_settings(chosen))

    keyword = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in (*kept, *added)]
    with_options.__signature__ = signature.replace(parameters=keyword)  # type: ignore[attr-defined]
    # typer reads types from here, and must not find the types of `command`.
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword}
    return with_options


def setting_of(option: str) -> str | None:
    """The setting that an option gives, by the option's parameter; None for other options."""
    if option == _REGEX:
        return "target_modules"
    if option in _OLD_OPTIONS:
        return "rank"
    return option if option in {setting.name for setting in fields(Settings)} else None


def _setting_options() -> list[inspect.Parameter]:
    types = inspect.get_annotations(Settings)
    options = []
    for setting in fields(Settings):
        flag = f"--{setting.name.replace('_', '-')}"
        kind, default, flag = _SPECIAL.get(
            setting.name, (types[setting.name], setting.default, flag)
        )
        text = setting.metadata["help"]
        if setting.name == "block_size":  # numbers, whose choices typer does not list
            kind = int | None
        if setting.name in ("bits", "block_size"):
            allowed = [str(one) for one in setting.metadata["allowed"] if one is not None]
            text = f"{text.removesuffix('.')}: {', '.join(allowed)}."
        options.append(_option(setting.name, kind, default, flag, text))
    return options


def _regex_option() -> inspect.Parameter:
    text = "Alternative to --target: a regular expression that matches whole paths."
    return _option(_REGEX, str | None, None, "--target-regex", text)


def _old_options() -> list[inspect.Parameter]:
    """The options of qrefta 0.1 that chose the rank; they work and are not listed."""
    return [
        _option(name, kind | None, None, f"--{name.replace('_', '-')}", "Use --rank.", hidden=True)
        for name, (kind, _) in _OLD_OPTIONS.items()
    ]


def _option(
    name: str, kind: Any, default: Any, flag: str, text: str, hidden: bool = False
) -> inspect.Parameter:
    annotation = Annotated[
        kind, typer.Option(flag, help=text, hidden=hidden, rich_help_panel=_PANEL)
    ]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `prepare` from the values of the options."""
    regex = values.pop(_REGEX)
    if regex is not None:
        values["target_modules"] = regex
    old = {name: values.pop(name) for name in _OLD_OPTIONS}
    given = {name: value for name, value in old.items() if value is not None}
    if given:
        values["rank"] = _rank_of_old_options(values["rank"], given)
    values["bits"] = _bits(values["bits"])
    values["rank"] = parse_rank(values["rank"])
    return values


def _bits(text: str) -> int | str:
    """A number, or a word that `Settings` takes or refuses."""
    return int(text) if text.isdecimal() else text


def rounding_of(settings: dict[str, Any]) -> Settings:
    """Settings that tell how weights are rounded; the other options are checked later."""
    names = ("bits", "target_bits", "rounding")
    rank = 0 if settings["rank"] == 0 else AUTO_RANK
    return Settings(rank=rank, **{name: settings[name] for name in names})


def _rank_of_old_options(rank: str, given: dict[str, Any]) -> str:
    """The text of --rank that the options of qrefta 0.1 stand for, with a note on stderr."""
    if len(given) != 1:
        raise ValueError(
            f"--rank {rank} came with {given}; give one rank or budget: --rank auto, 16, "
            "24,100,100, bytes=8MB, error=0.5 or parameters=300000"
        )
    ((name, value),) = given.items()
    if name == "budget_mb":
        value = round(value * 1e6)
    text = _OLD_OPTIONS[name][1].format(value)
    flag = f"--{name.replace('_', '-')}"
    typer.echo(f"{flag} is deprecated; use --rank {text}", err=True)
    return text
