"""The folder that transformers is saving a model to."""

import sys
from pathlib import Path

__all__ = ["folder_being_saved"]


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
