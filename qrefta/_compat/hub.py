"""Private names of transformers about the hub.

They are apart from the others, because importing this file loads no model code.
"""

from typing import TYPE_CHECKING

from transformers.utils.hub import cached_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["cached_hub_file", "commit_hash"]


def commit_hash(config: "PreTrainedConfig") -> str | None:
    """The commit of a hub's repository that a config was read from; None for a local folder.

    If it goes: the file of the branch's latest commit is used.
    """
    return getattr(config, "_commit_hash", None)


def cached_hub_file(name: str, file: str, config: "PreTrainedConfig") -> str | None:
    """Path of a hub's file in the local cache; None if the hub has no such file.

    It is of the commit that `config` came from. If the two keywords go: `hf_hub_download` of
    huggingface_hub and its exceptions.
    """
    return cached_file(
        name,
        file,
        revision=commit_hash(config),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
