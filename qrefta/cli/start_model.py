"""The model that `qrefta finetune` starts from: prepared already, or prepared here."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qrefta.choices import LoadDtype, Task
from qrefta.cli.calibrating import NONE, prepare_calibrated
from qrefta.cli.console import console
from qrefta.cli.dtype import chosen_dtype
from qrefta.cli.options import rounding_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = "data"  # calibrates with rows of the training data
_START = "start"  # folder in OUT: the prepared model, for the other processes
_PARTIAL = "start.partial"  # that folder, until it is whole
START_FOLDERS = (_START, _PARTIAL)


class StartModel(NamedTuple):
    """A model, and how it is loaded and prepared.

    With several processes the first one prepares it and keeps it in OUT, and the others load that.

    Attributes:
        source: folder, hub name or GGUF file.
        out: OUT.
        task: of the run.
        settings: keywords of `prepare`.
        trust_remote_code: run the code of the source.
    """

    source: str
    out: Path
    task: Task
    settings: dict[str, Any]
    trust_remote_code: bool

    def processor(self) -> Any:
        """The tokenizer; for images the image processor.

        Raises:
            ValueError: if there is none.
        """
        from transformers import AutoImageProcessor

        from qrefta.files.sources import load_tokenizer, pretrained_source

        if self.task == "image":
            source = pretrained_source(self.source, self.trust_remote_code)
            return AutoImageProcessor.from_pretrained(**source)
        tokenizer = load_tokenizer(self.source, self.trust_remote_code)
        if tokenizer is None:
            raise ValueError(
                f"{self.source} has no tokenizer files. Save the tokenizer of this model into the "
                "folder: tokenizer.save_pretrained(...)"
            )
        return tokenizer

    def load(self, data: Any, dtype: LoadDtype, device: str) -> "PreTrainedModel":
        """The model, from OUT if a process has kept it there, with the task's head.

        Raises:
            ValueError: if a dtype is given that the model of a task does not train in.
        """
        from qrefta.train.models import load_model

        source = str(self._folder) if self._folder.is_dir() else self.source
        chosen = self._dtype(source, dtype, device)
        seed = self.settings["seed"]
        return load_model(source, self.task, data, seed, self.trust_remote_code, chosen)

    def _dtype(self, source: str, dtype: LoadDtype, device: str) -> Any:
        """The dtype to load the model in, which is said if the files have another one."""
        from qrefta.train.tasks import TASKS

        if TASKS[self.task].trains_head:
            if dtype not in ("auto", "float32"):
                raise ValueError(
                    f"--dtype is {dtype}, and the task {self.task} trains a head, in float32; "
                    "leave it out, or give --bf16, which computes in bfloat16"
                )
            return "auto"

        def note() -> None:
            console.print(
                "In float32, in memory and in OUT: this processor computes bfloat16 many times "
                "slower. --dtype bfloat16 keeps the files' dtype."
            )

        return chosen_dtype([source], dtype, device, self.trust_remote_code, note)

    def prepare(
        self,
        model: "PreTrainedModel",
        processor: Any,
        data: Any,
        max_length: int | None,
        calibration: str,
    ) -> None:
        """Prepare a dense model in place, calibrated as --calibration says."""
        from qrefta._prepare import prepare
        from qrefta.split.sources import calibration_batches
        from qrefta.train.calibration import task_batches

        seed = self.settings["seed"]
        if calibration == NONE:
            if rounding_of(self.settings).must_round_in_order:
                raise ValueError(
                    "--rounding sequential needs text to calibrate on: leave --calibration none out"
                )
            prepare(model, **self.settings)
            return
        if calibration == ROWS:
            batches = task_batches(
                self.task, model, processor, data, max_length=max_length, seed=seed
            )
            source = "the training data"
        else:
            batches = list(calibration_batches(model, calibration, processor, seed=seed))
            source = calibration
        prepare_calibrated(model, batches, source, self.settings)

    def keep(self, model: "PreTrainedModel") -> None:
        """Save the prepared model for the other processes: whole, or not at all."""
        partial = self.out / _PARTIAL
        model.save_pretrained(partial)
        partial.rename(self._folder)

    def not_seen(self) -> ValueError:
        """The error of a process that does not see the model which the first one has kept."""
        return ValueError(
            f"{self._folder} is not seen here; OUT must be a folder that all nodes share."
        )

    def remove(self) -> None:
        """Remove the model that was kept, once the run is saved."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return self.out / _START
