"""Checksums of a prepared model, kept in the header of each of its safetensors files.

transformers writes the metadata that a quantizer returns into the header of every file that
`save_pretrained` makes. There a prepared model keeps one text under `qrefta_checksums`:

    {"algorithm": "crc32", "config": "8c3b1f02", "tensors": {"classifier.bias": "0f1e2d3c4b5a6978"}}

A tensor's checksum is two: of its dtype and shape, and of its bytes as stored. The checksum of
config.json covers its settings and not its layout: spaces and the order of keys may change. CRC-32
finds every flipped bit and every damaged run of up to 32 bits; other damage goes unseen once in 4
billion tensors. It is several times faster than SHA-256. It is no protection against a person who
changes a weight on purpose: that person can change the checksum too.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

KEY = "qrefta_checksums"  # in the metadata of a safetensors file
PLACEHOLDER = "0" * 16  # as long as a checksum
_ALGORITHM = "crc32"
# transformers adds it to config.json later, for models whose code is in their folder
_VOLATILE = "auto_map"


@dataclass(frozen=True)
class Checksums:
    """The checksums in the header of one safetensors file.

    Attributes:
        tensors: checksum by the tensor's name in the file; may name tensors of other files of the
            folder too. None: the tensor was saved from disk and is not covered.
        config: checksum of config.json; None in files that were written before it was known.
    """

    tensors: Mapping[str, str | None]
    config: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The checksums in a header's text.

        Raises:
            ValueError: if the text is damaged, or from a newer version.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict):
            raise ValueError(f"{KEY} holds no checksums of tensors")
        algorithm = content.get("algorithm")
        if algorithm != _ALGORITHM:
            raise ValueError(
                f"checksums are of the kind {algorithm!r}, and this package knows {_ALGORITHM}; "
                "update it: pip install -U qrefta"
            )
        return cls(content["tensors"], content.get("config"))

    def metadata(self) -> dict[str, str]:
        """The header's text, by its key."""
        content: dict[str, Any] = {"algorithm": _ALGORITHM}
        if self.config is not None:
            content["config"] = self.config
        return {KEY: json.dumps(content | {"tensors": dict(self.tensors)})}


def tensor_checksum(dtype: torch.dtype, shape: Iterable[int], chunks: Iterable[memoryview]) -> str:
    """The checksum of a tensor whose bytes come in chunks."""
    checksum = 0
    for chunk in chunks:
        checksum = zlib.crc32(chunk, checksum)
    return f"{form_checksum(dtype, shape)}{checksum:08x}"


def form_checksum(dtype: torch.dtype, shape: Iterable[int]) -> str:
    """The first half of a tensor's checksum, known before its bytes are read: a header may claim
    terabytes.
    """
    return f"{zlib.crc32(f'{dtype} {list(shape)}'.encode()):08x}"


def settings_checksum(settings: dict[str, Any]) -> str:
    """The checksum of the settings in a config.json, whatever its layout."""
    covered = {name: value for name, value in settings.items() if name != _VOLATILE}
    return f"{zlib.crc32(json.dumps(covered, sort_keys=True).encode()):08x}"


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
