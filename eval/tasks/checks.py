"""Checks of qrefta on one small model: each works, is refused with words, or fails."""

import copy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import qrefta
from eval.tasks.architectures import small_inputs
from qrefta import export_lora, load, merge, prepare, prepare_checkpoint
from qrefta.config.stack import BANK
from qrefta.export.compare import output_difference
from qrefta.model.stacks import find_stacks
from qrefta.model.unquantized import unquantized

RANK = 2
REVERSIBLE = ("reformer",)  # types that train in no other mode, and if the embeddings do
EQUAL = 1e-3  # relative difference of outputs that float32 may make in another order
PACKAGE = Path(qrefta.__file__).parent


def check(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """The outcome of every check by name, and the weights of the blocks that stay in 16 bits.

    Args:
        model: dense, in float32.
        folder: new; models are written to it.
    """
    kept = unquantized(model, find_stacks(model))
    found: dict[str, Any] = {
        "share_16_bit": kept.share,
        "layers_16_bit": [vars(layer) for layer in kept.layers],
    }
    subject = _Subject(model, small_inputs(model), folder)
    checks: dict[str, Callable[[], None]] = {
        "16 bits": subject.identity,
        "training": subject.training,
        "reload": subject.reload,
        "out of core": subject.out_of_core,
        "merge to a folder": subject.merge_to_folder,
        "LoRA": subject.lora,
        "merge in place": subject.merge_in_place,
    }
    return found | {"checks": {name: _outcome(step) for name, step in checks.items()}}


def _outcome(step: Callable[[], None]) -> str:
    try:
        step()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        inside = Path(frame.filename).is_relative_to(PACKAGE)
        ours = inside and isinstance(error, ValueError) and error.__cause__ is None
        kind = "refused" if ours else "fails"
        place = "" if ours else f" ({Path(frame.filename).name}:{frame.lineno})"
        return f"{kind}: {type(error).__name__}: {str(error)[:600]}{place}"
    return "works"


def summary(checks: dict[str, str]) -> str:
    """The worst outcome of all checks.

    A LoRA that is refused does not count: experts with factors have no LoRA form.
    """
    kinds = {
        outcome.partition(":")[0]
        for name, outcome in checks.items()
        if name != "LoRA" or not outcome.startswith("refused")
    }
    return next((kind for kind in ("fails", "refused") if kind in kinds), "works")


class _Subject:
    """A dense model and the model that is prepared from it, one check after the other.

    Attributes:
        prepared: None if preparing was refused.
    """

    def __init__(self, dense: PreTrainedModel, inputs: dict[str, Tensor], folder: Path) -> None:
        self.dense = dense
        self.inputs = inputs
        self.folder = folder
        self.expected = self.run(dense)
        self.prepared: PreTrainedModel | None = None
        self.start: dict[str, Tensor] = {}

    def run(self, model: torch.nn.Module) -> Tensor:
        """The first output in eval mode."""
        torch.manual_seed(0)
        with torch.no_grad():
            return model.eval()(**self.inputs)[0]

    def identity(self) -> None:
        """In 16 bits the prepared model equals the dense model."""
        model = copy.deepcopy(self.dense)
        prepare(model, bits=16, rank=RANK, method="refta", refine=0, progress=False)
        _check_close("16 bits", self.run(model), self.expected)

    def training(self) -> None:
        """Factors whose layers run get finite gradients."""
        model = prepare(copy.deepcopy(self.dense), rank=RANK, progress=False)
        self.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.prepared = model
        idle = self._idle_layers()
        if model.config.model_type in REVERSIBLE:
            model.train().enable_input_require_grads()
        torch.manual_seed(0)
        model(**self.inputs)[0].float().square().mean().backward()
        for index, row in enumerate(model.hf_quantizer.quantization_config.stacks):
            for factor in getattr(model, BANK)[f"stack{index}"].trained():
                if factor.grad is None:
                    assert set(row.stack.modules) <= idle, f"{row.stack.name} has no gradient"
                else:
                    assert torch.isfinite(factor.grad).all(), f"{row.stack.name}: not finite"
        with torch.no_grad():
            for factors in getattr(model, BANK).values():
                for factor in factors.trained():
                    factor.add_(torch.randn_like(factor), alpha=0.02)
        model.zero_grad()

    def _idle_layers(self) -> set[str]:
        """Paths of the dense model's weights that the inputs do not reach."""
        torch.manual_seed(0)
        dense = copy.deepcopy(self.dense)
        dense.train(dense.config.model_type in REVERSIBLE)
        dense(**self.inputs)[0].float().square().mean().backward()
        return {
            name.removesuffix(".weight")
            for name, parameter in dense.named_parameters()
            if parameter.grad is None
        }

    def reload(self) -> None:
        """A saved model loads bit for bit."""
        model = self._prepared()
        expected = self.run(model)
        model.save_pretrained(self.folder / "saved")
        loaded = load(self.folder / "saved")
        _check_equal(loaded.state_dict(), model.state_dict())
        # convolutions may round in another order at another place in memory
        _check_close("the loaded model", self.run(loaded), expected)

    def out_of_core(self) -> None:
        """Preparing folder to folder gives the bits of preparing in memory."""
        self._prepared()
        self.dense.save_pretrained(self.folder / "dense")
        prepare_checkpoint(
            self.folder / "dense", self.folder / "prepared", rank=RANK, progress=False
        )
        loaded = load(self.folder / "prepared")
        _check_equal(loaded.state_dict(), self.start)

    def merge_to_folder(self) -> None:
        """The merged folder loads without qrefta and computes the same."""
        model = self._prepared()
        out = self.folder / "merged"
        merge(model, torch.float32, out=out, inputs=self.inputs)
        merged = type(model).from_pretrained(out, dtype=torch.float32)
        _check_close("the merged folder", self.run(merged), self.run(model))

    def lora(self) -> None:
        """A LoRA on the residual computes the same; `export_lora` compares."""
        export_lora(self._prepared(), self.folder / "lora", dtype=torch.float32, inputs=self.inputs)

    def merge_in_place(self) -> None:
        """The merged model computes the same."""
        model = self._prepared()
        expected = self.run(model)
        _check_close("the merged model", self.run(merge(model, torch.float32)), expected)

    def _prepared(self) -> PreTrainedModel:
        """The prepared model.

        Raises:
            ValueError: as `prepare`, if it refused the model.
        """
        if self.prepared is None:
            prepare(copy.deepcopy(self.dense), rank=RANK, progress=False)
        assert self.prepared is not None, "the training step failed"
        return self.prepared


def _check_close(name: str, found: Tensor, expected: Tensor) -> None:
    difference = output_difference(found, expected)
    assert difference < EQUAL, f"{name} differs by {difference:.2g} of the outputs"


def _check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    other = sorted(found.keys() ^ expected.keys())
    assert not other, f"tensors of one of the two: {other[:3]}"
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} differs"
