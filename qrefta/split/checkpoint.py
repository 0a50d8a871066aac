"""A checkpoint folder -> a prepared checkpoint folder, with little memory.

The stacks go from `FolderSource`, which reads a few rows at a time, to `FolderSink`, which keeps a
journal: an interrupted run resumes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qrefta.config.settings import Settings
from qrefta.files.folders import JOURNAL, LOCK, check_new, held
from qrefta.files.sources import resolve_folder
from qrefta.files.whole_file import remove_temporary_files
from qrefta.hf_config import QReftaConfig
from qrefta.model.modes import without_autocast_and_compile
from qrefta.split.folder_sink import FolderSink
from qrefta.split.folder_source import FolderSource
from qrefta.split.loop import split_stacks
from qrefta.split.moments import Moments


def without_order(settings: Settings) -> Settings:
    """The settings with rounding="auto" resolved, for preparing without a model that runs.

    Raises:
        ValueError: if rounding is "sequential".
    """
    if settings.must_round_in_order:
        raise ValueError(
            'rounding="sequential" runs the model on calibration text, so it needs the model in '
            'memory: call qrefta.prepare(model, calibration=..., rounding="sequential").'
        )
    return settings.with_rounding(in_order=False)


@without_autocast_and_compile()
def convert(
    source: str | Path,
    out: Path,
    settings: Settings,
    moments: Moments | None,
    device: torch.device,
    max_memory: int | str,
    progress: bool,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    kind: type[PreTrainedModel] | None = None,
) -> Path:
    """Prepare the model in `source` (folder or hub name) into `out`; the arguments of
    `qrefta.prepare_checkpoint`.

    The result equals preparing in memory bit for bit on the same device, unless `max_memory` makes
    blocks smaller than `BLOCK_BYTES`, or the checkpoint holds tensors of another dtype than the
    model is loaded in.

    Args:
        base_model: name of the source to keep in the config; default: `source`.
        trust_remote_code: whether to run code that comes with the model.
        kind: a class in whose module the model's class is looked for first.

    Returns:
        `out`.

    Raises:
        ValueError: as `qrefta.prepare_checkpoint`.
    """
    calibrated = moments is not None
    dense = resolve_folder(source)
    settings = without_order(settings)
    checkpoint = FolderSource(
        dense, settings, device, max_memory, calibrated, trust_remote_code, kind
    )
    if moments is not None:
        moments.check(checkpoint.stacks)
    settings = checkpoint.settings
    with _locked(out):
        folder = FolderSink(out, checkpoint, moments)
        split_stacks(checkpoint, folder, settings, moments, progress)
        config = QReftaConfig(
            settings,
            calibrated=calibrated,
            base_model=base_model or str(source),
            stacks=folder.reports,
        )
        folder.finish(config)
    return out


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Within this context no other process prepares into the folder; it is made if it is new.

    Raises:
        ValueError: if another process holds the folder, or it holds something else than an
            unfinished run.
    """
    _check_out(out)
    with held(out):
        _check_out(out)  # another process may have finished it meanwhile
        remove_temporary_files(out)
        yield


def _check_out(out: Path) -> None:
    """Refuse a folder with other files than an unfinished run; a run that was killed early has left
    its lock, and its journal under a temporary name.
    """
    if not (out / JOURNAL).is_file():
        check_new(out, ignoring=[LOCK, f"{JOURNAL}.*.tmp"])
