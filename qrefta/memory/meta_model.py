"""A config -> the model that `prepare` would make of it, without storage: its sizes, and a part of
it to count.

Sizes are counted for the whole model. Of a list of equal blocks only the first three are kept to
run, with the factors of all blocks (see `qrefta.memory.footprint`); a list of different blocks is
kept whole.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from qrefta.config.checks import whole
from qrefta.config.settings import Settings
from qrefta.config.stack import BANK, LayerStack
from qrefta.files.code import is_trusted
from qrefta.files.sources import pretrained_source
from qrefta.memory.footprint import COUNTED_BLOCKS
from qrefta.model.build import Placement, build, freeze, with_trained_modules
from qrefta.model.empty import model_class
from qrefta.model.positions import position_limit
from qrefta.model.stacks import ends_with, find_stacks
from qrefta.nn.experts import route_evenly
from qrefta.nn.quantized import QuantFormat
from qrefta.split.loop import choices_without_weights

ModelSource = PreTrainedModel | PreTrainedConfig | str | Path


class Sizes(NamedTuple):
    """Bytes of a prepared model: packed weights and scales of the blocks, everything that stays
    dense, factors.
    """

    linears: int
    rest: int
    factors: int


@dataclass(frozen=True)
class Outline:
    """A dense model on the meta device.

    Attributes:
        model: cut to the first blocks of every list in `blocks`.
        blocks: path of each list that was cut -> its number of blocks.
        stacks: of the whole model.
        rest_numbers: floating-point numbers outside the weights of the stacks.
        rest_bytes: bytes of other numbers outside the weights of the stacks.
    """

    model: PreTrainedModel
    blocks: dict[str, int]
    stacks: list[LayerStack]
    rest_numbers: int
    rest_bytes: int

    @classmethod
    def of(
        cls,
        source: ModelSource,
        modules_to_save: Sequence[str] = (),
        cut: bool = True,
        trust_remote_code: bool = False,
    ) -> Self:
        """The outline of a hub name, a folder, a config or a model.

        Args:
            source: see `qrefta.plan`.
            modules_to_save: names of modules that train in full; lists that hold one are not cut.
            cut: whether to cut lists of blocks.
            trust_remote_code: whether to run code that comes with a model given by name.

        Raises:
            ValueError: if the source is something else, is quantized, or names no model class of
                transformers.
        """
        model = _without_storage(source, trust_remote_code)
        stacks = find_stacks(model)
        weights = {
            id(model.get_parameter(path if stack.experts else f"{path}.weight"))
            for stack in stacks
            for path in stack.modules
        }
        tensors = [*model.parameters(), *model.buffers()]
        rest = [tensor for tensor in tensors if id(tensor) not in weights]
        numbers = sum(tensor.numel() for tensor in rest if tensor.is_floating_point())
        others = sum(tensor.nbytes for tensor in rest if not tensor.is_floating_point())
        blocks = _alike_blocks(model, stacks, modules_to_save) if cut else {}
        for path in blocks:
            del _block_list(model, path)[COUNTED_BLOCKS:]
        return cls(model, blocks, stacks, numbers, others)

    def prepared(self, settings: Settings, dtype: torch.dtype) -> tuple[PreTrainedModel, Sizes]:
        """The cut model as `prepare` would make it, on the meta device, and the sizes of the whole
        model.
        """
        model = _in_dtype(copy.deepcopy(self.model), dtype)
        ranks, quant_types = choices_without_weights(self.stacks, settings)
        settings = with_trained_modules(model, settings, self.stacks)
        paths = {path for path, _ in (*model.named_modules(), *model.named_parameters())}
        placements = [
            Placement(_cut(stack, paths), rank, quant_type, stack.layers)
            for stack, rank, quant_type in zip(self.stacks, ranks, quant_types, strict=True)
        ]
        with torch.device("meta"):
            build(model, settings, placements)
        route_evenly(model)
        freeze(model, settings.modules_to_save)
        linears = sum(
            stack.layers * _weight_bytes(stack, QuantFormat.of(settings.of_stack(kind)), dtype)
            for stack, kind in zip(self.stacks, quant_types, strict=True)
        )
        factors = sum(parameter.nbytes for parameter in getattr(model, BANK).parameters())
        rest = self.rest_numbers * dtype.itemsize + self.rest_bytes
        return model, Sizes(linears, rest, factors)

    def inputs(self, batch: int, seq: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """A batch of the model's inputs, all zero.

        Raises:
            ValueError: if the model takes neither text nor images, or the sizes do not fit it.
        """
        kind = self.model.main_input_name
        name = type(self.model).__name__
        whole("batch", batch, 1)
        if kind == "pixel_values":
            return {kind: self._images(batch, seq, dtype)}
        if kind != "input_ids":
            raise ValueError(f"{name} takes {kind}; plan supports models of text and of images.")
        if seq is None:
            raise ValueError(
                f"{name} takes text: give seq, the tokens of a sequence (seq=2048, --seq 2048)."
            )
        whole("seq", seq, 1)
        config = self.model.config
        positions = position_limit(self.model)
        if positions is not None and seq > positions:
            raise ValueError(
                f"seq is {seq}, but {name} has {positions} positions; give at most {positions}"
            )
        ids = torch.zeros(batch, seq, dtype=torch.long)
        if config.is_encoder_decoder:
            return {kind: ids, "decoder_input_ids": ids}
        return {kind: ids}

    def _images(self, batch: int, seq: int | None, dtype: torch.dtype) -> Tensor:
        config = self.model.config
        name = type(self.model).__name__
        size = getattr(config, "image_size", None)
        if seq is not None:
            raise ValueError(
                f"seq is {seq!r}, but {name} takes images, whose size its config states: leave seq "
                "out"
            )
        if size is None:
            raise ValueError(
                f"{name} takes images of any size; plan needs an image_size in the config."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(batch, config.num_channels, height, width, dtype=dtype)


def _without_storage(source: ModelSource, trust_remote_code: bool) -> PreTrainedModel:
    kind: type[PreTrainedModel] | None = None
    if isinstance(source, str | Path):
        config = AutoConfig.from_pretrained(**pretrained_source(source, trust_remote_code))
    elif isinstance(source, PreTrainedModel):
        config = copy.deepcopy(source.config)
        kind = type(source)
    elif isinstance(source, PreTrainedConfig):
        config = copy.deepcopy(source)
    else:
        raise ValueError(
            "plan takes a transformers model, its config, or a hub name or folder, not a "
            f"{type(source).__name__}."
        )
    if getattr(config, "quantization_config", None):
        raise ValueError("The model is already quantized; plan from the config of the dense model.")
    if kind is None:
        if not config.architectures:
            raise ValueError(
                f"This {type(config).__name__} names no model class; set its `architectures`, such "
                "as "
                '["LlamaForCausalLM"], or give a model, which may be on the meta device.'
            )
        kind = model_class(vars(config), config.name_or_path or "it", is_trusted(config))
    config.use_cache = False
    with torch.device("meta"):
        model = kind(config)
    return model if config.dtype is None else _in_dtype(model, config.dtype)


def _in_dtype(model: PreTrainedModel, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model in a dtype; transformers' wrapper of `to` hides its parameters."""
    return model.to(dtype)  # pyright: ignore[reportArgumentType]


def _alike_blocks(
    model: PreTrainedModel, stacks: list[LayerStack], modules_to_save: Sequence[str]
) -> dict[str, int]:
    """Paths of the lists of blocks that are alike from the second on, with their lengths."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or [""]
    if len(set(layer_types)) > 1:
        return {}
    lists = dict.fromkeys(
        stack.name.split(".*.")[0] for stack in stacks if stack.name.count("*") == 1
    )
    lengths = {}
    for path in lists:
        blocks = _block_list(model, path)
        inside = [name for name, _ in blocks.named_modules(prefix=path)]
        trains = any(ends_with(name, saved) for name in inside for saved in modules_to_save)
        alike = len({_form(block) for block in list(blocks)[1:]}) == 1
        if len(blocks) > COUNTED_BLOCKS and alike and not trains:
            lengths[path] = len(blocks)
    return lengths


def _block_list(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    """The list of blocks at a path."""
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList | nn.Sequential), "stacks lie in lists of blocks"
    return blocks


def _form(block: nn.Module) -> tuple[Any, ...]:
    """Facts that are equal for two blocks that compute alike."""
    modules = tuple((path, type(module)) for path, module in block.named_modules())
    shapes = tuple((path, parameter.shape) for path, parameter in block.named_parameters())
    return modules, shapes


def _cut(stack: LayerStack, paths: set[str]) -> LayerStack:
    """A stack without the layers that were cut."""
    return replace(stack, modules=tuple(path for path in stack.modules if path in paths))


def _weight_bytes(stack: LayerStack, fmt: QuantFormat | None, dtype: torch.dtype) -> int:
    """Bytes of one weight as stored."""
    numbers = stack.out_features * stack.in_features
    if fmt is None:
        return numbers * dtype.itemsize
    return sum(fmt.packed_sizes(numbers).values())
