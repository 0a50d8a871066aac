"""A config -> the model that `prepare` would make of it, without storage: its sizes, and a part of it to count.

Sizes are those of the whole model. Of a list of blocks that are all alike only the first three are kept to be run,
with the factors of all (see `qrefta.memory.footprint`); a list whose blocks differ is kept whole.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from qrefta.config import StackRow
from qrefta.hf_config import QReftaConfig
from qrefta.memory.footprint import COUNTED_BLOCKS
from qrefta.model.build import build, freeze, model_class, trained_modules
from qrefta.model.stacks import LayerStack, ends_with, find_stacks, select_stacks
from qrefta.nn.experts import route_evenly
from qrefta.nn.factors import BANK, Rank
from qrefta.split.allocate import choose_ranks


class Sizes(NamedTuple):
    """Bytes of a prepared model: linears of the blocks (packed weights and scales), all else that is dense, factors."""

    linears: int
    rest: int
    factors: int


@dataclass(frozen=True)
class Outline:
    """A dense model on the meta device.

    Attributes:
        model: cut to the first blocks of every list in `blocks`.
        blocks: path of each list that was cut -> how many blocks it had.
        stacks: of the whole model.
        rest_numbers, rest_bytes: outside the stacks' weights: floating numbers, and bytes of what is not floating.
    """

    model: PreTrainedModel
    blocks: dict[str, int]
    stacks: list[LayerStack]
    rest_numbers: int
    rest_bytes: int

    @classmethod
    def of(
        cls,
        source: PreTrainedModel | PreTrainedConfig | str | Path,
        modules_to_save: Sequence[str] = (),
        cut: bool = True,
    ) -> Self:
        """The outline of a hub name, a folder, a config or a model.

        Args:
            source: see `qrefta.plan`.
            modules_to_save: names of modules that train whole; lists that hold one are not cut.
            cut: whether to cut at all.

        Raises:
            ValueError: if the source is something else, is quantized, or names no model class of transformers.
        """
        model = _without_storage(source)
        stacks = find_stacks(model)
        weights = {
            id(model.get_parameter(path if stack.experts else f"{path}.weight"))
            for stack in stacks
            for path in stack.modules
        }
        rest = [
            tensor
            for tensor in (*model.parameters(), *model.buffers())
            if id(tensor) not in weights
        ]
        numbers = sum(tensor.numel() for tensor in rest if tensor.is_floating_point())
        others = sum(tensor.nbytes for tensor in rest if not tensor.is_floating_point())
        blocks = _alike_blocks(model, stacks, modules_to_save) if cut else {}
        for path in blocks:
            del model.get_submodule(path)[COUNTED_BLOCKS:]
        return cls(model, blocks, stacks, numbers, others)

    def prepared(self, config: QReftaConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, Sizes]:
        """The cut model as `config` prepares it, on the meta device, and the sizes of the whole."""
        model = copy.deepcopy(self.model).to(dtype)
        ranks = choose_ranks(
            select_stacks(self.stacks, config.target_modules), [], config, None, False
        )
        config.modules_to_save = trained_modules(model, config.modules_to_save, self.stacks)
        paths = {path for path, _ in (*model.named_modules(), *model.named_parameters())}
        config.stacks = [_row(stack, ranks.get(stack, 0), paths) for stack in self.stacks]
        with torch.device("meta"):
            build(model, config)
        route_evenly(model)
        freeze(model, config.modules_to_save)
        linears = sum(stack.layers * _linear_bytes(stack, config, dtype) for stack in self.stacks)
        factors = sum(parameter.nbytes for parameter in getattr(model, BANK).parameters())
        return model, Sizes(linears, self.rest_numbers * dtype.itemsize + self.rest_bytes, factors)

    def inputs(self, batch: int, seq: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """A batch of the model's inputs, all zero.

        Raises:
            ValueError: if the model takes neither text nor images, or the sizes do not go with it.
        """
        config, kind, name = (
            self.model.config,
            self.model.main_input_name,
            type(self.model).__name__,
        )
        _check_whole("batch", batch)
        if kind == "pixel_values":
            size = getattr(config, "image_size", None)
            if seq is not None:
                raise ValueError(
                    f"seq is {seq!r}, but {name} takes images, of the size that its config says: give none"
                )
            if size is None:
                raise ValueError(
                    f"{name} takes images of any size; plan needs an image_size in the config."
                )
            height, width = (size, size) if isinstance(size, int) else size
            return {kind: torch.zeros(batch, config.num_channels, height, width, dtype=dtype)}
        if kind != "input_ids":
            raise ValueError(f"{name} takes {kind}; plan knows models of text and of images.")
        if seq is None:
            raise ValueError(f"{name} takes text: give seq, the tokens of a sequence.")
        _check_whole("seq", seq)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or seq
        if seq > positions:
            raise ValueError(f"seq is {seq}, but {name} has {positions} positions; give no more")
        ids = torch.zeros(batch, seq, dtype=torch.long)
        return {kind: ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {kind: ids}


def _check_whole(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, 1 or more")


def _without_storage(source: PreTrainedModel | PreTrainedConfig | str | Path) -> PreTrainedModel:
    if isinstance(source, str | Path):
        config, kind = AutoConfig.from_pretrained(source), None
    elif isinstance(source, PreTrainedModel):
        config, kind = copy.deepcopy(source.config), type(source)
    elif isinstance(source, PreTrainedConfig):
        config, kind = copy.deepcopy(source), None
    else:
        raise ValueError(
            f"plan takes a transformers model, its config, or a hub name or folder, not a {type(source).__name__}."
        )
    if getattr(config, "quantization_config", None):
        raise ValueError("The model is already quantized; plan from the dense one's config.")
    if kind is None:
        if not config.architectures:
            raise ValueError(
                f"This {type(config).__name__} names no model class; set its `architectures`, such as "
                '["LlamaForCausalLM"], or give a model, which may be on the meta device.'
            )
        kind = model_class(config.architectures[0], "it")
    config.use_cache = False
    with torch.device("meta"):
        model = kind(config)
    return model if config.dtype is None else model.to(config.dtype)


def _alike_blocks(
    model: nn.Module, stacks: list[LayerStack], modules_to_save: Sequence[str]
) -> dict[str, int]:
    """Paths of the lists of blocks that are alike from the second on, with their lengths."""
    if len(set(getattr(model.config.get_text_config(), "layer_types", None) or [""])) > 1:
        return {}
    found = {}
    for path in dict.fromkeys(
        stack.name.split(".*.")[0] for stack in stacks if stack.name.count("*") == 1
    ):
        blocks = model.get_submodule(path)
        inside = [name for name, _ in blocks.named_modules(prefix=path)]
        whole = any(ends_with(name, saved) for name in inside for saved in modules_to_save)
        if (
            len(blocks) > COUNTED_BLOCKS
            and len({_form(block) for block in list(blocks)[1:]}) == 1
            and not whole
        ):
            found[path] = len(blocks)
    return found


def _form(block: nn.Module) -> tuple[Any, ...]:
    """What two blocks have in common if they compute alike."""
    modules = tuple((path, type(module)) for path, module in block.named_modules())
    return modules, tuple((path, parameter.shape) for path, parameter in block.named_parameters())


def _row(stack: LayerStack, rank: Rank, paths: set[str]) -> StackRow:
    """A row as `build` needs it: of the layers that were kept, with factors of all."""
    return StackRow(
        stack=stack.name,
        modules=[path for path in stack.modules if path in paths],
        transposed=stack.transposed,
        layers=stack.layers,
        shape=[stack.out_features, stack.in_features],
        rank=rank,
        slice_ranks=[],
        transform=None,
        quant_type=None,
        baseline_error=0.0,
        residual_error=0.0,
        ratio=1.0,
        principal_energy=0.0,
        bytes=0,
        bits_per_weight=0.0,
        experts=stack.experts,
    )


def _linear_bytes(stack: LayerStack, config: QReftaConfig, dtype: torch.dtype) -> int:
    """Of one weight as stored."""
    numbers = stack.out_features * stack.in_features
    return (
        numbers * dtype.itemsize
        if config.format is None
        else sum(config.format.packed_sizes(numbers).values())
    )
