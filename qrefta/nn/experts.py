"""Experts of mixture-of-experts models: where transformers keeps their weights, and their pass with adapted linears.

transformers 5 keeps all experts of a block in one module with two fused parameters, (experts, out, in), or (experts,
in, out) where the module says that it is transposed: `gate_up_proj` (`up_proj` without a gate) and `down_proj`. It
chooses the module's forward pass by a name in the config (`transformers.integrations.moe`), from functions that know
nothing of the model: gate, activation, biases and norm are the module's own. Ours is one more of them, "qrefta". The
module stays, without its fused parameters: in the place of each is a list of linears, one an expert, under the
parameter's name with `_adapted` after it. (Under its own name transformers would take their packed bytes for the fused
weights that it splits and merges on saving and loading.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qrefta._compat.transformers import (
    ALL_EXPERTS_FUNCTIONS,
    EXPERTS_CONTRACT,
    apply_gate,
    mark_initialized,
    set_experts_implementation,
)

IMPLEMENTATION = "qrefta"
_EVEN = "qrefta_even"
_DEFAULT = "grouped_mm"  # transformers' own
_SUFFIX = "_adapted"


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps fused experts and leaves its forward pass to transformers' interface."""
    return all(hasattr(module, name) for name in EXPERTS_CONTRACT) and all(
        getattr(module, name, torch.empty(0)).dim() == 3 for name in fused_names(module)
    )


def is_adapted(module: nn.Module) -> bool:
    """Whether a module keeps experts that were given linears of their own."""
    return hasattr(module, f"down_proj{_SUFFIX}")


def fused_names(experts: nn.Module) -> tuple[str, str]:
    """Names of the two fused parameters, in the order in which tokens pass them."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def expert_path(path: str, expert: int) -> str:
    """Module path of one expert's adapted linear, by the path of the fused parameter."""
    return f"{path}{_SUFFIX}.{expert}"


def add_expert(experts: nn.Module, name: str, linear: nn.Module) -> None:
    """Let `linear` compute the next expert's part of a fused parameter, which goes when the last expert has one."""
    count = len(getattr(experts, name))
    if not hasattr(experts, name + _SUFFIX):
        setattr(experts, name + _SUFFIX, nn.ModuleList())
    linears = getattr(experts, name + _SUFFIX).append(linear)
    if len(linears) == count:
        delattr(experts, name)
        set_experts_implementation(experts.config, IMPLEMENTATION)
        mark_initialized(experts)  # or transformers, after loading, would draw the fused weights


def route_evenly(model: nn.Module) -> None:
    """Let every adapted experts module of `model` give all experts the same number of tokens, whatever the router says.

    It is for models without values, in which nothing can be routed.
    """
    for module in model.modules():
        if is_adapted(module):
            set_experts_implementation(module.config, _EVEN)


def restore_fused(
    experts: nn.Module, name: str, weights: Iterator[Tensor], dtype: torch.dtype
) -> None:
    """Put a fused parameter back in the place of its linears, made of their `weights`, (out, in), one after the other.

    The forward pass is transformers' default again.
    """
    linears = getattr(experts, name + _SUFFIX)
    fused: Tensor | None = None
    for expert, weight in enumerate(weights):
        weight = weight.T if experts.is_transposed else weight
        fused = (
            weight.new_empty(len(linears), *weight.shape, dtype=dtype) if fused is None else fused
        )
        fused[expert] = weight
    delattr(experts, name + _SUFFIX)
    experts.register_parameter(name, nn.Parameter(fused))
    set_experts_implementation(experts.config, _DEFAULT)


def fused_inputs(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """What a dense module multiplies with its two fused parameters: pairs of a name and inputs, (tokens, in).

    The first parameter's are all tokens, once; the second's come expert by expert.

    Args:
        experts: not yet adapted.
        hidden_states, top_k_index: as its forward pass takes them.
    """
    first, second = fused_names(experts)
    yield first, hidden_states
    fused = getattr(experts, first)
    for expert, tokens in enumerate(_by_expert(hidden_states, top_k_index, len(fused))[1]):
        if len(tokens):
            weight = fused[expert].T if experts.is_transposed else fused[expert]
            yield (
                second,
                _activated(
                    experts, _biased(experts, first, expert, nn.functional.linear(tokens, weight))
                ),
            )


def _by_expert(
    hidden_states: Tensor, top_k_index: Tensor, count: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tokens sorted by their experts.

    Returns:
        The order of the (token, choice) pairs, flat, and in it the tokens of every expert, (its tokens, in).
    """
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    tokens = hidden_states[order // top_k_index.shape[1]]
    return order, tokens.split(torch.bincount(chosen, minlength=count).tolist())


def _biased(experts: nn.Module, name: str, expert: int, product: Tensor) -> Tensor:
    bias = getattr(experts, f"{name}_bias", None)
    return product if bias is None else product + bias[expert].to(product.dtype)


def _activated(experts: nn.Module, product: Tensor) -> Tensor:
    return apply_gate(experts, product) if experts.has_gate else experts.act_fn(product)


@torch.compiler.disable
def _forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The pass of an experts module through its adapted linears; experts without tokens are left out.

    It is not compiled: how many tokens an expert has differs in every step, and each number would be compiled anew.

    Args:
        self: the experts module.
        hidden_states: (tokens, in).
        top_k_index, top_k_weights: (tokens, choices), the experts of each token and what their outputs count.
    """
    first, second = fused_names(self)
    if not is_adapted(self):  # a dense model made from this one's config
        return ALL_EXPERTS_FUNCTIONS[_DEFAULT](self, hidden_states, top_k_index, top_k_weights)
    inner, outer = getattr(self, first + _SUFFIX), getattr(self, second + _SUFFIX)
    order, groups = _by_expert(hidden_states, top_k_index, len(inner))
    products = []
    for expert, tokens in enumerate(groups):
        if len(tokens):
            active = _activated(self, _biased(self, first, expert, inner[expert](tokens)))
            products.append(_biased(self, second, expert, outer[expert](active)))
    outputs = torch.cat(products)
    if getattr(self, "has_post_expert_norm", False):
        outputs = self.post_expert_norm(outputs)
    weighted = outputs * top_k_weights.reshape(-1)[order].unsqueeze(1)
    # Back in the tokens' order, and summed over their choices: index_add would add in any order on CUDA.
    return weighted[order.argsort()].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


def _forward_evenly(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The same pass, with tokens dealt out in turn."""
    experts = len(getattr(self, fused_names(self)[0] + _SUFFIX))
    dealt = torch.arange(top_k_index.numel()).remainder(experts).view(top_k_index.shape)
    return _forward(self, hidden_states, dealt, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
ALL_EXPERTS_FUNCTIONS.register(_EVEN, _forward_evenly)
