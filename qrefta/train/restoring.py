"""The weights of a checkpoint, back in the model that a run trains.

transformers' Trainer fills a model by the names in its files and passes over names that differ, but
for many classes `save_pretrained` writes other names than the model has (ViT, Swin, Mixtral), or
several tensors in place of one.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from qrefta.files.layout import has_weights, weight_files
from qrefta.files.safetensors import Checkpoint
from qrefta.model.check import missing_tensors
from qrefta.model.names import sources


class RestoresAll(Trainer):
    """A Trainer that restores every tensor of a checkpoint, to resume and to keep the best model;
    put it before another in the bases of a class.
    """

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._restore(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not self._restores:  # else it would name tensors that are about to be filled
            super()._issue_warnings_after_load(load_result)

    def _restore(self, checkpoint: str) -> None:
        if self._restores:
            restore(cast(PreTrainedModel, self.model), Path(checkpoint))

    @property
    def _restores(self) -> bool:
        return isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled


@torch.no_grad()
def restore(model: PreTrainedModel, folder: Path) -> None:
    """Fill the tensors of a model that a folder, which was saved from it, has under other names.

    Raises:
        ValueError: if the folder has no values for a tensor.
    """
    if not has_weights(folder):  # adapters alone, or the shards of FSDP2
        return
    checkpoint = Checkpoint(folder)
    stored = set(checkpoint.names)
    state = model.state_dict()
    if state.keys() <= stored:
        return
    missing = missing_tensors(model, [str(file) for file in weight_files(folder)])
    if missing:
        raise ValueError(
            f"{folder} has no values for {missing[0]} under a name that is known, so the model "
            "cannot be restored from it. Load the folder and train it as a new run."
        )
    for name, names in sources(model, checkpoint).items():
        if name not in stored:
            state[name].copy_(_read(checkpoint, names, state[name].shape))


def _read(checkpoint: Checkpoint, names: list[list[str]], shape: torch.Size) -> Tensor:
    """A tensor of one stored tensor, or of the matrices of all experts, some below one another."""
    if len(names) == 1 and len(names[0]) == 1:
        return checkpoint.read(names[0][0]).view(shape)
    return torch.stack([torch.cat([checkpoint.read(name) for name in rows]) for rows in names])
