"""Where the time of a training step goes: self time of torch's operations, by kind.

Kinds are told apart by the name of an operation and the sizes of its inputs. Time outside of torch,
such as Python's, is not in the sum.
"""

from collections import Counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

NARROW = 64  # a matrix product with a side of at most this belongs to low-rank factors
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "dot", "mv", "addmv")
HEAD = "head and loss"
KINDS = (
    "products with frozen weights",
    "products with factors",
    "dequantization",
    "attention",
    HEAD,
    "optimizer",
    "other",
)


class StepProfile:
    """Shares of the kinds between `start` and `stop`.

    Args:
        words: size of the vocabulary; an operation with such a side belongs to the head.
    """

    def __init__(self, words: int) -> None:
        self.words = words

    def start(self) -> None:
        """Begin to record."""
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.profiler.start()

    def stop(self) -> dict[str, float]:
        """Seconds by kind."""
        self.profiler.stop()
        seconds: Counter[str] = Counter()
        for event in self.profiler.key_averages(group_by_input_shape=True):
            seconds[kind_of(event.key, event.input_shapes, self.words)] += (
                event.self_cpu_time_total / 1e6
            )
        return {kind: seconds[kind] for kind in KINDS}


def kind_of(operation: str, shapes: list[Any], words: int) -> str:
    """The kind of an operation.

    Args:
        operation: its name, such as aten::mm.
        shapes: of its inputs; empty for inputs that are no tensors.
        words: size of the vocabulary.
    """
    name = operation.removeprefix("aten::").strip("_")
    sizes = [size for shape in shapes if isinstance(shape, list) for size in shape]
    if operation.startswith("Optimizer") or name.startswith(("foreach", "fused_adam")):
        return "optimizer"
    if words in sizes:
        return HEAD
    if operation.startswith("bitsandbytes"):
        return "dequantization"
    if "scaled_dot_product" in name:
        return "attention"
    if name in PRODUCTS:
        narrow = min(sizes, default=0) <= NARROW
        return "products with factors" if narrow else "products with frozen weights"
    return "other"
