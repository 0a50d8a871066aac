"""The stacks of a prepared model whose blocks were removed or reordered after `prepare`.

The factors of a stack keep the K layers that it was prepared with. A layer that remains keeps its
number among them, wherever its block stands now.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from qrefta.config.report import StackReport
from qrefta.config.stack import BANK, EXPERTS_SUFFIX
from qrefta.model.config_file import counts
from qrefta.nn.linear import AdaptedLinear

_WRAPPER = "_checkpoint_wrapped_module."  # torch's; state dicts leave it out


def present_stacks(model: PreTrainedModel, reports: Sequence[StackReport]) -> list[StackReport]:
    """The reports of a prepared model, with the linear layers that it has now.

    A stack of which a layer is dense, as in the middle of a merge, keeps its report.

    Raises:
        ValueError: if the config has another number of blocks than the model, or a block is a copy.
    """
    adapted = _adapted_layers(model)
    names = {name for name, _ in model.named_parameters()}
    now = []
    for report in reports:
        paths = report.stack.modules
        dense = any(
            path not in adapted and not names.isdisjoint((path, f"{path}.weight")) for path in paths
        )
        now.append(report if dense else _present(model, report, adapted))
    if now != list(reports):
        _check_depth(model)
    return now


def check_present(model: PreTrainedModel, reports: Sequence[StackReport]) -> None:
    """Refuse a model in which a layer of a stack was replaced or parametrized, or the last one was
    removed: its folder would not load.

    Raises:
        ValueError: naming the layer.
    """
    _check_parametrized(model)
    adapted = _adapted_layers(model)
    for report in reports:
        gone = next((path for path in report.stack.adapted if path not in adapted), None)
        if gone is not None:
            raise ValueError(
                f"{gone} is no quantized layer any more. If a merge in place was interrupted, "
                "call qrefta.merge(model) again. If the layer was replaced or removed, start from "
                "the dense model: change it there, and prepare it."
            )


def _adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted linear layers by the path that state dicts give them."""
    return {
        path.replace(_WRAPPER, ""): module
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }


def _present(
    model: PreTrainedModel, report: StackReport, adapted: dict[str, AdaptedLinear]
) -> StackReport:
    """A report with the adapted layers of its stack, in the model's order."""
    stack = report.stack
    pattern = re.escape(stack.name).replace(r"\*", r"\d+")
    expert = rf"{re.escape(EXPERTS_SUFFIX)}\.\d+" if stack.experts else ""
    shape = (stack.out_features, stack.in_features)
    modules: dict[str, None] = {}
    rows = []
    count = report.factor_layers
    for path, layer in adapted.items():
        match = re.fullmatch(f"({pattern}){expert}", path)
        if match is None or (layer.out_features, layer.in_features) != shape:
            continue
        modules[match[1]] = None
        if layer.factors is not None:
            if not layer.uses(getattr(model, BANK)):
                raise ValueError(
                    f"{path} was copied with its block, and its copy of the factors is not in the "
                    "model: it neither trains nor is saved. Copy blocks before prepare; or call "
                    "qrefta.merge(model), copy blocks of the dense model, and prepare it again."
                )
            rows.append(layer.row)
            count = layer.factors.layers
    if not modules:
        return report
    unchanged = rows == list(range(count))
    found = replace(stack, modules=tuple(modules))
    if found == stack and (unchanged or tuple(rows) == report.rows):
        return report
    kept = rows and not unchanged
    return replace(
        report,
        stack=found,
        rows=tuple(rows) if kept else (),
        prepared_layers=count if kept else None,
        bytes=_stored_bytes([adapted[path] for path in found.adapted]),
    )


def _stored_bytes(layers: Sequence[AdaptedLinear]) -> int:
    """Bytes of the packed weights of some layers, and of the factors that they share."""
    factors = layers[0].factors
    weights = sum(layer.frozen_weight().nbytes for layer in layers)
    return weights + (0 if factors is None else factors.stored_bytes)


def _check_parametrized(model: PreTrainedModel) -> None:
    """Refuse torch's parametrizations that the model's class does not have itself."""
    found = [path for path, module in model.named_modules() if is_parametrized(module)]
    if not found:
        return
    described = dict(_described(model).named_modules())
    for path in found:
        if path not in described or not is_parametrized(described[path]):
            raise ValueError(
                f"{path} is parametrized (torch.nn.utils.parametrize), so its tensors have other "
                "names, which no model would load. Call "
                "torch.nn.utils.parametrize.remove_parametrizations(module, name) before saving."
            )


def _check_depth(model: PreTrainedModel) -> None:
    """Refuse a config that describes another number of blocks than the model has."""
    described = _described(model)
    modules = dict(model.named_modules())
    for path, blocks in described.named_modules():
        now = modules.get(path)
        if not isinstance(blocks, nn.ModuleList) or not isinstance(now, nn.ModuleList):
            continue
        if len(now) != len(blocks):
            settings = counts(model.config.to_dict())
            names = dict.fromkeys(name for name, value in settings if value == len(blocks))
            raise ValueError(
                f"{path} has {len(now)} blocks, and by its config it has {len(blocks)}: the model "
                "could not be loaded. Set model.config."
                f"{' or '.join(names) or 'num_hidden_layers'} = {len(now)}."
            )


def _described(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model that the config describes, without storage.

    Raises:
        ValueError: if the config makes none.
    """
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    except Exception as error:  # of any custom class
        raise ValueError(
            f"The model changed, and its config makes no {type(model).__name__} any more: {error} "
            "Change model.config with the model."
        ) from error
