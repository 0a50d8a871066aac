"""Checkpoints of a training run, and the model at its end: there whole, or not at all.

transformers' Trainer writes the files of a checkpoint one after the other where they will be looked for. Here they go
to a folder beside it, reach the disk, and get their place by one rename; until then the checkpoint before is the last.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer

from qrefta._compat.transformers import rotate_checkpoints
from qrefta.files.safetensors import sync_folder
from qrefta.hf_quantizer import saved_state

UNFINISHED = (
    "unfinished"  # in a run's folder: what is being written, or was when the run was killed
)
_CONFIGS = ("config.json", "adapter_config.json")  # without one of them a folder is no model
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TORCH_SAVE = (
    "PytorchStreamWriter",
    "unexpected pos",
    "iostream error",
)  # in its RuntimeErrors for a full disk


def whole_checkpoints(kind: type[Trainer]) -> type[Trainer]:
    """The Trainer with checkpoints that are whole."""

    class WholeCheckpoints(kind):
        """Its `_save_checkpoint` writes elsewhere; the first of several processes renames once all have written."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            with saved_state(self.model, state_dict):
                super()._save(output_dir, state_dict)

        def _save_checkpoint(self, *args: Any) -> None:
            run, step = Path(self.args.output_dir), self.state.global_step
            with writing(run, f"the checkpoint of step {step}") as folder:
                self.args.output_dir = str(folder)
                try:
                    super()._save_checkpoint(*args)
                finally:
                    self.args.output_dir = str(run)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    _place(folder / f"checkpoint-{step}", run)
                    rotate_checkpoints(str(run), self.args.save_total_limit, use_mtime=True)
            self.accelerator.wait_for_everyone()

    return WholeCheckpoints


def last_checkpoint(run: str | Path) -> Path | None:
    """The last checkpoint in a run's folder."""
    written = Path(run).glob(
        "checkpoint-[0-9]*/trainer_state.json"
    )  # Trainer writes this file last
    return max(
        (file.parent for file in written),
        key=lambda path: int(path.name.split("-")[1]),
        default=None,
    )


def clear_unfinished(run: str | Path) -> None:
    """Remove what a run that was killed left unfinished."""
    shutil.rmtree(Path(run) / UNFINISHED, ignore_errors=True)


@contextmanager
def writing(run: Path, what: str) -> Iterator[Path]:
    """A folder within a run's to write into; if that fails, all in it is removed.

    Raises:
        OSError: if it cannot be written.
    """
    folder = run / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except (OSError, SafetensorError, RuntimeError) as error:
        clear_unfinished(run)
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _TORCH_SAVE):
            raise
        raise OSError(
            f"Cannot write {what} to {run}: {error}. What was there before is whole; make room, or give rights, and go "
            "on from the last checkpoint (resume=True, --resume)."
        ) from error


def publish(folder: Path, run: Path) -> None:
    """Move a model's files from `folder` to the run's, in the place of an older model.

    The old config goes first and the new one comes last: in between there is no model, rather than a mixed one.
    """
    _sync(folder)
    for pattern in (*_CONFIGS, *_WEIGHTS):
        for old in run.glob(pattern):
            old.unlink()
    sync_folder(run)
    for path in sorted(folder.iterdir(), key=lambda path: path.name in _CONFIGS):
        if path.is_dir():
            shutil.rmtree(run / path.name, ignore_errors=True)
        path.replace(run / path.name)
    sync_folder(run)
    folder.rmdir()


def _place(checkpoint: Path, run: Path) -> None:
    """Move a checkpoint to the run's folder, in the place of an older one of its name."""
    _sync(checkpoint)
    place, replaced = run / checkpoint.name, checkpoint.with_name("replaced")
    if place.exists():
        place.rename(replaced)
    checkpoint.rename(place)
    sync_folder(run)
    clear_unfinished(run)


def _sync(folder: Path) -> None:
    """Wait until a folder and all that is in it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
