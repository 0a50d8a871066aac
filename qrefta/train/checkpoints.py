"""Checkpoints of a training run, and its final model: whole, or not there.

transformers' Trainer writes the files of a checkpoint one by one into their final folder. Here they
are written to the folder `unfinished`, synced to the disk and moved by one rename; until then the
previous checkpoint is the last.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from qrefta._compat.transformers import rotate_checkpoints
from qrefta.files.folders import CONFIGS, move_entries, sync_folder
from qrefta.train.same_run import MARKS

UNFINISHED = "unfinished"  # folder in a run's folder: files being written, or left by a killed run
STATE = "trainer_state.json"  # Trainer writes this file last
_WEIGHTS = tuple(
    f"{name}{kind}"
    for name in ("model", "model-*-of-*", "adapter_model")
    for kind in (".safetensors", ".safetensors.index.json")
)
# texts in the RuntimeErrors of torch.save on a full disk
_TORCH_SAVE = ("PytorchStreamWriter", "unexpected pos", "iostream error")


class WholeCheckpoints(Trainer):
    """A Trainer that writes whole checkpoints; put it before another in the bases of a class.

    All processes write to `unfinished`; when all are done, the first process renames.

    Attributes:
        marks: of the run's data, stored with each checkpoint (`qrefta.train.same_run`).
    """

    marks: dict[str, Any] | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(str(self.args.output_dir))
        step = self.state.global_step
        with writing(run, f"the checkpoint of step {step}") as folder:
            self.args.output_dir = str(folder)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(run)
            checkpoint = folder / f"checkpoint-{step}"
            self._correct_best(checkpoint, run)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.marks is not None:
                    (checkpoint / MARKS).write_text(json.dumps(self.marks), encoding="utf-8")
                _place(checkpoint, run)
                rotate_checkpoints(
                    output_dir=str(run),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )
        self.accelerator.wait_for_everyone()

    def _correct_best(self, checkpoint: Path, run: Path) -> None:
        """Replace the best checkpoint's path in `unfinished` by its final path."""
        if self.state.best_model_checkpoint == str(checkpoint):
            self.state.best_model_checkpoint = str(run / checkpoint.name)
            if self.args.should_save:
                self.state.save_to_json(str(checkpoint / STATE))


def last_checkpoint(run: str | Path) -> Path | None:
    """The last checkpoint in a run's folder; unfinished ones do not count."""
    checkpoints = [file.parent for file in Path(run).glob(f"checkpoint-*/{STATE}")]
    numbers = {path: path.name.removeprefix("checkpoint-") for path in checkpoints}
    whole = [path for path, number in numbers.items() if number.isdecimal()]  # no copy of a user's
    return max(whole, key=lambda path: int(numbers[path]), default=None)


def remove_unfinished_folder(run: str | Path) -> None:
    """Remove the files that a killed run left unfinished."""
    shutil.rmtree(Path(run) / UNFINISHED, ignore_errors=True)


@contextmanager
def writing(run: Path, files: str) -> Iterator[Path]:
    """A folder inside a run's folder to write `files` into; it is removed if that fails.

    Raises:
        OSError: if the files cannot be written.
    """
    folder = run / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except Exception as error:
        remove_unfinished_folder(run)
        full_disk = isinstance(error, RuntimeError) and any(t in str(error) for t in _TORCH_SAVE)
        if not full_disk and not isinstance(error, OSError | SafetensorError):
            raise
        raise OSError(
            f"Cannot write {files} to {run}: {error}. All earlier files are whole; make room or "
            "give write access, and continue from the last checkpoint (resume=True, --resume)."
        ) from error


def publish(folder: Path, run: Path) -> None:
    """Move a model's files from `folder` to the run's folder, where they replace an older model.

    The old config is removed first and the new config is moved last, so the folder never holds
    files of both models. Files with other names stay.
    """
    _sync(folder)
    for pattern in (*CONFIGS, *_WEIGHTS):
        for old in run.glob(pattern):
            old.unlink()
    sync_folder(run)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(run / path.name, ignore_errors=True)
    move_entries(folder, run)


def _place(checkpoint: Path, run: Path) -> None:
    """Move a checkpoint to the run's folder, where it replaces an older one of the same name."""
    _sync(checkpoint)
    place = run / checkpoint.name
    if place.exists():
        place.rename(checkpoint.with_name("replaced"))
    checkpoint.rename(place)
    sync_folder(run)
    remove_unfinished_folder(run)


def _sync(folder: Path) -> None:
    """Wait until a folder and all its content are on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
