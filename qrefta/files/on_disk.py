"""Tensors whose memory is a file without a name, so that the system may write them to the disk."""

import math
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def empty_on_disk(
    folder: Path, forms: Mapping[str, tuple[torch.dtype, Sequence[int]]]
) -> dict[str, Tensor]:
    """Tensors by name, for more data than the memory holds; their values are zero.

    Their pages leave the memory when other data need it. The disk has room for all of them from
    the start, and it is free again when the tensors are gone.

    Args:
        folder: on the disk to use.
        forms: dtypes and shapes.

    Raises:
        OSError: if the disk is full.
    """
    places = {}
    end = 0
    for name, (dtype, shape) in forms.items():
        nbytes = math.prod(shape) * dtype.itemsize
        places[name] = (end, nbytes)
        end += -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    with tempfile.TemporaryFile(dir=folder) as file:
        _take(file.fileno(), end, folder)
        tensors = {}
        for name, (dtype, shape) in forms.items():
            offset, nbytes = places[name]
            data = torch.empty(0, dtype=torch.uint8)
            if nbytes:  # one map for each: savers copy tensors that are parts of another
                data = torch.from_numpy(np.memmap(file, mode="r+", offset=offset, shape=(nbytes,)))
            tensors[name] = data.view(dtype).view(shape)
    return tensors


def _take(file: int, nbytes: int, folder: Path) -> None:
    """Take room on the disk for a file: on a full disk, a write to its map would end the process.

    macOS and Windows cannot reserve room in this way; there the file only gets its size.

    Raises:
        OSError: if there is too little.
    """
    if not nbytes:
        return
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, nbytes)
        else:
            os.ftruncate(file, nbytes)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot keep a model ({nbytes / 1e6:.1f} MB) in a file in {folder}: {error.strerror}",
        ) from error
