"""transformers' quantization config of a prepared model: the settings, and a report for every
stack.

`qrefta.hf_quantizer` registers it. This module is imported while transformers imports its models
(see `qrefta._plugin`), so it imports neither `transformers.modeling_utils` nor bitsandbytes.
"""

from collections.abc import Sequence
from typing import Any, Self

from transformers.utils.quantization_config import QuantizationConfigMixin

from qrefta.config.call import warn_of_idle
from qrefta.config.old_rank import OLD_RANK_SETTINGS, with_new_rank
from qrefta.config.report import StackReport
from qrefta.config.settings import SETTING_NAMES, Settings

FORMAT_VERSION = 3


class QReftaConfig(QuantizationConfigMixin):
    """Settings and reports of a prepared model; the `quantization_config` of its config.json.

    Args:
        settings: the settings, or give them as keywords (see `qrefta.Settings`).
        calibrated: whether second moments of the inputs weighted the split.
        base_model: folder or hub name of the dense model that was prepared, if it is known.
        stacks: a `StackReport` (or its dict) for every stack; empty before the model is prepared.
        format_version: of the checkpoint. Versions 1 and 2 are migrated; a newer version than this
            package writes is refused.
        keywords: settings, if `settings` is not given.

    Raises:
        ValueError: for a value that is not allowed, an unknown setting, or a newer or damaged
            format.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        calibrated: bool = False,
        base_model: str | None = None,
        stacks: Sequence[StackReport | dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = "qrefta",
        **keywords: Any,
    ) -> None:
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has qrefta format version {format_version!r}; this package reads "
                f"1 to {FORMAT_VERSION}. Update it: pip install -U qrefta"
            )
        if stacks is not None and not isinstance(stacks, list | tuple):
            raise ValueError(
                f"stacks is {stacks!r}; it must be a list. config.json is damaged: restore it."
            )
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.settings = settings or _settings(keywords, format_version)
        if not stacks:
            warn_of_idle(keywords, stacklevel=3)
        self.calibrated = calibrated
        self.base_model = base_model
        self.stacks = [
            stack if isinstance(stack, StackReport) else StackReport.from_dict(stack)
            for stack in stacks or []
        ]

    @classmethod
    def of(cls, model_config: dict[str, Any]) -> Self:
        """The config in the content of a prepared model's config.json."""
        return cls(**model_config["quantization_config"])

    def to_dict(self) -> dict[str, Any]:
        """The config as config.json holds it."""
        return {
            "quant_method": self.quant_method,
            "format_version": FORMAT_VERSION,
            **self.settings.to_dict(),
            "calibrated": self.calibrated,
            "base_model": self.base_model,
            "stacks": [stack.to_dict() for stack in self.stacks],
        }


def _settings(keywords: dict[str, Any], format_version: int) -> Settings:
    """Settings from the keywords of a saved config, of format 1 to 3, or of a call.

    Formats 1 and 2 had one way of rounding, and refta as default; INT4 had searched scales.
    """
    if format_version < 3:
        searched = keywords.get("quant_type") == "int4"
        older = {
            "method": "refta",
            "scales": "searched" if searched else "absmax",
            "rounding": "nearest",
        }
        keywords = older | keywords
    unknown = sorted(set(keywords) - SETTING_NAMES - set(OLD_RANK_SETTINGS))
    if unknown:
        raise ValueError(
            f"Unknown qrefta settings {unknown}; the config is damaged or from another version."
        )
    return Settings(**with_new_rank(keywords))
