"""Experts of mixture-of-experts models: their fused weights, and the forward pass after adapting.

transformers 5 keeps all experts of a block in one module with two fused parameters, (experts, out,
in), or (experts, in, out) if the module says that it is transposed: `gate_up_proj` (`up_proj`
without a gate) and `down_proj`. It chooses the forward pass of the module by a name in the config
(`transformers.integrations.moe`). These functions know nothing of the model: gate, activation,
biases and norm belong to the module.

Here is one more of these functions, "qrefta". Its name is in a copy of the config that the module
holds, since `set_experts_implementation` and `generate` change the name in the model's config. The
module stays, without its fused parameters. Each is replaced by a list of linear layers, one an
expert, under the name of the parameter with `_adapted` after it. (Under the parameter's name
itself, transformers would take their packed bytes for the fused weights that it splits and merges
on saving and loading.)
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from qrefta._compat.transformers import (
    ALL_EXPERTS_FUNCTIONS,
    EXPERTS_CONTRACT,
    apply_gate,
    mark_initialized,
    with_experts_implementation,
)
from qrefta.config.stack import EXPERTS_SUFFIX

IMPLEMENTATION = "qrefta"
_EVEN = "qrefta_even"
# An nn.Module with the attributes in `EXPERTS_CONTRACT`; transformers has no class for it.
Experts = Any


def is_experts(module: Experts) -> bool:
    """Whether a module has fused experts and a forward pass that transformers chooses by name."""
    if not all(hasattr(module, name) for name in EXPERTS_CONTRACT):
        return False
    weights = [getattr(module, name, None) for name in fused_names(module)]
    return all(weight is not None and weight.dim() == 3 for weight in weights)


def is_adapted(module: nn.Module) -> bool:
    """Whether the experts of a module are adapted linear layers."""
    return hasattr(module, f"down_proj{EXPERTS_SUFFIX}")


def fused_names(experts: Experts) -> tuple[str, str]:
    """Names of the two fused parameters, in the order in which tokens pass them."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    return first, "down_proj"


def add_expert(experts: Experts, name: str, linear: nn.Module) -> None:
    """Let `linear` compute a fused parameter's part of the next expert.

    The fused parameter is removed when the last expert has its linear layer.
    """
    count = len(getattr(experts, name))
    if not hasattr(experts, name + EXPERTS_SUFFIX):
        setattr(experts, name + EXPERTS_SUFFIX, nn.ModuleList())
    linears = _adapted(experts, name)
    linears.append(linear)
    if len(linears) == count:
        delattr(experts, name)
        _use(experts, IMPLEMENTATION)
        # Or transformers would initialize the fused weights after loading.
        mark_initialized(experts)


def route_evenly(model: nn.Module) -> None:
    """Let every adapted experts module of `model` give all experts the same number of tokens.

    The router is ignored. This is for models without values, which cannot route.
    """
    for module in model.modules():
        if is_adapted(module):
            _use(module, _EVEN)


def restore_fused(
    experts: Experts, name: str, weights: Iterator[Tensor], dtype: torch.dtype
) -> None:
    """Replace the linear layers of a fused parameter by the parameter.

    The forward pass is again the one that the model's config names. The linear layers go last, so
    an interrupted call can be repeated.

    Args:
        experts: an adapted experts module.
        name: of the fused parameter.
        weights: of all experts, (out, in), one after the other.
        dtype: of the parameter.
    """
    count = len(_adapted(experts, name))
    fused: Tensor | None = None
    for expert, weight in enumerate(weights):
        if experts.is_transposed:
            weight = weight.T
        if fused is None:
            fused = weight.new_empty(count, *weight.shape, dtype=dtype)
        fused[expert] = weight
    assert fused is not None, "an experts module has experts"
    experts.register_parameter(name, nn.Parameter(fused))
    _use(experts, None)
    delattr(experts, name + EXPERTS_SUFFIX)


def fused_inputs(
    experts: Experts, hidden_states: Tensor, top_k_index: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The inputs of the two fused parameters of a dense module: pairs of a name and (tokens, in).

    The first parameter's are all tokens, once; the second's come expert by expert.

    Args:
        experts: not yet adapted.
        hidden_states, top_k_index: as its forward pass takes them.
    """
    first, second = fused_names(experts)
    yield first, hidden_states
    fused = getattr(experts, first)
    _, groups = _by_expert(hidden_states, top_k_index, len(fused))
    for expert, tokens in enumerate(groups):
        if len(tokens) == 0:
            continue
        weight = fused[expert].T if experts.is_transposed else fused[expert]
        product = nn.functional.linear(tokens, weight)
        yield second, _activated(experts, _biased(experts, first, expert, product))


def _use(experts: Experts, implementation: str | None) -> None:
    """Choose the forward pass of an experts module; None: the one that the model's config names."""
    config = vars(experts).pop("model_config", experts.config)
    experts.config = config
    if implementation is not None:
        experts.model_config = config
        experts.config = with_experts_implementation(config, implementation)


def _adapted(experts: Experts, name: str) -> nn.ModuleList:
    """The adapted linear layers that stand for a fused parameter."""
    return getattr(experts, name + EXPERTS_SUFFIX)


def _by_expert(
    hidden_states: Tensor, top_k_index: Tensor, count: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tokens sorted by their experts.

    Returns:
        The order of the (token, choice) pairs, flat; and for every expert its tokens, (tokens, in).
    """
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    tokens = hidden_states[order // top_k_index.shape[1]]
    counts = torch.bincount(chosen, minlength=count)
    return order, tokens.split(counts.tolist())


def _biased(experts: Experts, name: str, expert: int, product: Tensor) -> Tensor:
    bias = getattr(experts, f"{name}_bias", None)
    return product if bias is None else product + bias[expert].to(product.dtype)


def _activated(experts: Experts, product: Tensor) -> Tensor:
    if experts.has_gate:
        return apply_gate(experts, product)
    return experts.act_fn(product)


@torch.compiler.disable
def _forward(
    self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward pass of an experts module through its adapted linear layers.

    Experts without tokens are left out. It is not compiled: the number of tokens of an expert
    differs in every step, and torch would compile for every number.

    Args:
        self: the experts module.
        hidden_states: (tokens, in).
        top_k_index: (tokens, choices), the experts of each token.
        top_k_weights: (tokens, choices), the weights of their outputs.
    """
    first, second = fused_names(self)
    inner = _adapted(self, first)
    outer = _adapted(self, second)
    order, groups = _by_expert(hidden_states, top_k_index, len(inner))
    products = []
    for expert, tokens in enumerate(groups):
        if len(tokens) == 0:
            continue
        hidden = _biased(self, first, expert, inner[expert](tokens))
        active = _activated(self, hidden)
        products.append(_biased(self, second, expert, outer[expert](active)))
    outputs = torch.cat(products)
    if getattr(self, "has_post_expert_norm", False):
        outputs = self.post_expert_norm(outputs)
    weighted = outputs * top_k_weights.reshape(-1)[order].unsqueeze(1)
    # Back in the order of tokens, and summed over choices. index_add would be simpler, but on CUDA
    # it adds in an order that changes from run to run.
    by_token = weighted[order.argsort()].view(*top_k_index.shape, -1)
    return by_token.sum(1).to(hidden_states.dtype)


def _forward_evenly(
    self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same forward pass, with tokens dealt out in turn."""
    first, _ = fused_names(self)
    choices = torch.arange(top_k_index.numel())
    dealt = choices.remainder(len(_adapted(self, first))).view(top_k_index.shape)
    # `torch.compiler.disable` hides the signature from type checkers.
    return cast(Any, _forward)(self, hidden_states, dealt, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
ALL_EXPERTS_FUNCTIONS.register(_EVEN, _forward_evenly)
