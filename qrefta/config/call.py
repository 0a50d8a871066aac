"""Settings as keywords of a public function: in its signature, and checked from a call."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from qrefta.choices import FITTED, METHOD_NAMES
from qrefta.config.old_rank import OLD_RANK_SETTINGS, with_new_rank
from qrefta.config.settings import SETTING_NAMES, Settings

_Function = TypeVar("_Function", bound=Callable[..., Any])


def shows_settings(function: _Function) -> _Function:
    """Show the settings that a function takes as `**settings` in its signature, with types and
    defaults.
    """
    signature = inspect.signature(function, eval_str=True)
    listed = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    known = {parameter.name for parameter in listed}
    types = inspect.get_annotations(Settings, eval_str=True)
    listed += [
        inspect.Parameter(
            setting.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=setting.default,
            annotation=types[setting.name],
        )
        for setting in fields(Settings)
        if setting.name not in known
    ]
    function.__signature__ = signature.replace(parameters=listed)  # type: ignore[attr-defined]
    return function


def settings_of_call(function: str, keywords: dict[str, Any]) -> Settings:
    """Checked settings from the keywords of a call; the rank settings of qrefta 0.1 are taken with
    a warning.

    Args:
        function: name of the public function, which calls this directly.
        keywords: its keywords.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: for a value that is not allowed.
    """
    unknown = sorted(keywords.keys() - SETTING_NAMES - set(OLD_RANK_SETTINGS))
    if unknown:
        listed = ", ".join(sorted(SETTING_NAMES))
        raise TypeError(
            f"{function}() got an unexpected keyword {unknown[0]!r}; the settings are {listed}"
        )
    old = sorted(keywords.keys() & set(OLD_RANK_SETTINGS))
    if old:
        warnings.warn(
            f"{', '.join(old)} is deprecated; give a tuple or a qrefta.RankBudget as rank.",
            DeprecationWarning,
            stacklevel=3,
        )
    settings = Settings(**with_new_rank(keywords))
    warn_of_idle(keywords, stacklevel=4)
    return settings


def warn_of_idle(keywords: dict[str, Any], stacklevel: int) -> None:
    """Warn of a transform or rounds of refinement that the method of a call leaves unused, and of a
    format that 16 bits leave unused.

    `stacklevel` names the warning's line, as in `warnings.warn`.
    """
    if keywords.get("bits") == 16:
        reason = "bits=16, which does not quantize the weights."
        _warn_of_given(("quant_type", "double_quant", "block_size"), keywords, reason, stacklevel)
    method = keywords.get("method", Settings.method)
    if method not in FITTED and method in METHOD_NAMES:
        reason = (
            f"method {method}, which starts from zero. Methods that split the weights use it: "
            f"{', '.join(FITTED)}."
        )
        _warn_of_given(("transform", "refine"), keywords, reason, stacklevel)


def _warn_of_given(
    names: Sequence[str], keywords: dict[str, Any], reason: str, stacklevel: int
) -> None:
    """Warn of every one of these keywords that has another value than none and its default."""
    for name in names:
        if keywords.get(name) not in (None, 0, getattr(Settings, name)):
            warnings.warn(
                f"{name}={keywords[name]!r} has no effect with {reason}",
                stacklevel=stacklevel + 1,
            )
