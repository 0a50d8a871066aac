"""Saving by transformers: the folder and state that it writes, and how it uploads a folder."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.utils.hub import PushToHubMixin

__all__ = ["being_saved", "owner_being_saved", "set_upload", "upload"]


class SaveCall(NamedTuple):
    """A call of `save_pretrained`.

    Attributes:
        folder: that is written; None in a process that does not write, or for another caller.
        state: the `state_dict` that was given; None: the model's.
    """

    folder: Path | None = None
    state: Mapping[str, Tensor] | None = None


def being_saved() -> SaveCall:
    """The `save_pretrained` that asks a quantizer for the model's state dict.

    It is called by the quantizer's `get_state_dict_and_metadata`. transformers passes quantizers
    neither the folder nor the given state dict, and drops the second; so the caller's local
    variables are read. If they go: the folder has no model card, and a given state dict has to be
    refused.
    """
    caller = sys._getframe(2)
    names = caller.f_locals
    if caller.f_code.co_name != "save_pretrained":
        return SaveCall()
    folder = names.get("save_directory") if names.get("save_on_this_rank") else None
    return SaveCall(None if folder is None else Path(folder), names.get("state_dict"))


def owner_being_saved() -> object | None:
    """The object whose `save_pretrained` gathers a state dict now; None if there is none.

    It is called by a hook on the state dict of a module. If it goes: saving a model of which only a
    part was prepared does not warn.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "save_pretrained":
            return frame.f_locals.get("self")
        frame = frame.f_back
    return None


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
