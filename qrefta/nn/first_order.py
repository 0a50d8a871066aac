"""Backward passes that are not differentiated a second time.

torch's `once_differentiable` leaves an error in the graph, which only a later `backward()` meets:
`torch.autograd.grad` of given inputs passes it over, and Hessian-vector products come out wrong.
Here the first backward pass that is asked for a graph fails.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of an autograd function, which raises ValueError under create_graph=True.

    Autograd runs a backward pass in grad mode only if the pass itself is to be differentiated.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise ValueError(
                "create_graph=True: a prepared model has no second derivatives (gradient "
                "penalties, Hessian-vector products, AdaHessian). Compute them on the dense model, "
                "qrefta.merge(model), or leave create_graph out."
            )
        return backward(ctx, *grads)

    return checked
