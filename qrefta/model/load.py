"""A prepared model from a folder, of the class that saved it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qrefta.files.verify import check_settings, is_switched_off
from qrefta.model.config_file import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    folder: str | Path, *, trust_remote_code: bool = False, **kwargs: Any
) -> "PreTrainedModel":
    """A prepared model from a local folder, of the class that saved it.

    Short for `AutoModelFor...from_pretrained(folder, **kwargs)` with the class looked up in
    config.json, which is checked before transformers reads it.

    Args:
        folder: that a prepared model was saved to.
        trust_remote_code: whether to run code that comes with the model.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: if the folder has no config.json, holds no prepared model, is damaged, or needs
            code that is not trusted.
    """
    from qrefta.model.empty import model_class

    config = read_config(folder)
    if not is_switched_off():
        check_settings(Path(folder), config)
    kind = model_class(config, folder, trust_remote_code)
    try:
        return kind.from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # raised by transformers over a config that makes no model
        raise ValueError(
            f"{folder} cannot be loaded as {kind.__name__}: {type(error).__name__}: {error}. "
            "Unless an argument of load is the cause, config.json is damaged or of another "
            "version: copy or save the folder again."
        ) from error
