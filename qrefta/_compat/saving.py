"""Saving by transformers: the folder that it writes, and how it uploads a folder to a hub."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import PushToHubMixin

__all__ = ["folder_being_saved", "set_upload", "upload"]


def folder_being_saved() -> Path | None:
    """The folder of the `save_pretrained` that asks a quantizer for the model's state dict.

    It is called by the quantizer's `get_state_dict_and_metadata`. transformers passes quantizers no
    folder, so the caller's local variables are read. None in a process that does not write, or for
    another caller. If they go, the folder has no model card.
    """
    caller = sys._getframe(2)
    names = caller.f_locals
    if caller.f_code.co_name != "save_pretrained" or not names.get("save_on_this_rank"):
        return None
    folder = names.get("save_directory")
    return None if folder is None else Path(folder)


def set_upload(model: nn.Module, function: Callable[..., Any] | None) -> None:
    """Let transformers upload the folders of one model by a function, called as `upload` is; None:
    as it uploads other models.

    `push_to_hub` and `save_pretrained(push_to_hub=True)` write a model card over the one in the
    folder, and call this method next. If it goes: the hub shows transformers' card.
    """
    vars(model).pop("_upload_modified_files", None)
    if function is not None:
        vars(model)["_upload_modified_files"] = function


def upload(folder: str, *args: Any, commit_message: str | None = None, **kwargs: Any) -> Any:
    """Upload a folder as transformers does."""
    return PushToHubMixin()._upload_modified_files(
        folder, *args, commit_message=commit_message or "Upload model", **kwargs
    )
