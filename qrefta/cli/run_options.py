"""The options of a run of `qrefta finetune`, checked against a model that is prepared already."""

from typing import TYPE_CHECKING, Any

import typer

from qrefta.choices import AUTO_ROUNDING
from qrefta.cli.options import setting_of

if TYPE_CHECKING:
    from qrefta.config.settings import Settings


def options_of_run(
    ctx: typer.Context, settings: dict[str, Any], trust_remote_code: bool
) -> dict[str, Any]:
    """The values of the options that hold for the run; for a prepared model without the options of
    preparing.

    Raises:
        ValueError: if an option was given that would prepare a prepared model in another way.
    """
    from qrefta.config.settings import Settings

    kept = dict(ctx.params)
    model = kept["model"]
    prepared = _prepared_settings(model, trust_remote_code)
    if prepared is None:
        return kept
    asked = Settings(**settings)
    for parameter in ctx.command.params:
        name = str(parameter.name)
        setting = setting_of(name)
        if setting in (None, "seed") and name != "calibration":
            continue
        value = kept.pop(name)
        source = ctx.get_parameter_source(name)
        if source is None or source.name not in ("COMMANDLINE", "DEFAULT_MAP"):
            continue
        if setting is not None and _agrees(setting, asked, prepared):
            continue
        has = "" if setting is None else f" with {setting} {getattr(prepared, setting)}"
        raise ValueError(
            f"{max(parameter.opts, key=len)} {value} belongs to preparing, and {model} is prepared "
            f"already{has}; leave the option out, or give the dense model"
        )
    return kept


def _prepared_settings(model: str, trust_remote_code: bool) -> "Settings | None":
    """How a model was prepared, from its config.json; None for a dense model."""
    from transformers import AutoConfig

    from qrefta.files.sources import is_gguf, pretrained_source
    from qrefta.hf_config import QReftaConfig

    if is_gguf(model):
        return None
    config = AutoConfig.from_pretrained(**pretrained_source(model, trust_remote_code)).to_dict()
    if (config.get("quantization_config") or {}).get("quant_method") != "qrefta":
        return None
    return QReftaConfig.of(config).settings


def _agrees(setting: str, asked: "Settings", prepared: "Settings") -> bool:
    """Whether a prepared model has what an option asks for."""
    if setting == "rounding" and asked.rounding == AUTO_ROUNDING:
        return True
    if setting == "modules_to_save":  # the list of the model has its task head too
        return set(asked.modules_to_save) <= set(prepared.modules_to_save)
    return getattr(asked, setting) == getattr(prepared, setting)
