"""Where the time of a training step goes: in which module of the model, forward and backward.

Hooks open a range of torch's profiler around every module that has a kind. An operation belongs to
the innermost range around it, and an operation of the backward pass to the range of the operation
whose gradient it computes, which autograd numbers. Recomputed blocks open their ranges again.
Times are times without the operations inside, so the kinds add up to the whole step, Python
included.
"""

from collections import Counter
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from qrefta.model.adapters import without_peft

STEP = "step: "  # begins the names of ranges
DATA = "data"
ATTENTION = "attention"
MLP = "MLP"
FACTORS = "factors"
HEAD = "head and loss"
OPTIMIZER = "optimizer"
OTHER = "other"
KINDS = (DATA, ATTENTION, MLP, FACTORS, HEAD, OPTIMIZER, OTHER)
_BACKWARD = "autograd::engine::evaluate_function"
_ADAPTED = ("_AdaptedGradients", "_AdaptedProduct")


class StepProfile:
    """Seconds of the kinds between `start` and `stop`.

    The model's attention and MLP include their linear layers, without the factors. The head and the
    loss are everything in the model but its decoder, since trainers compute them with or without
    calling the module of the head.

    Args:
        model: a language model of blocks with modules `self_attn` and `mlp`; prepared, or PEFT's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.open: list[record_function] = []
        decoder = without_peft(model).get_decoder()
        for name, module in model.named_modules():
            kind = _kind_of(name)
            if module is decoder:
                kind = OTHER
            if module is model:
                kind = HEAD
            if kind is not None:
                self._follow(module, kind)

    def start(self) -> None:
        """Begin to record."""
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.profiler.start()
        self._enter(OTHER)

    def stop(self) -> dict[str, float]:
        """Seconds by kind; data is not seen here."""
        self._leave()
        self.profiler.stop()
        events: Any = self.profiler.events()
        forward = {
            event.sequence_nr: event
            for event in sorted(events, key=lambda event: event.time_range.start)
            if event.sequence_nr >= 0 and not _in_backward(event)
        }
        seconds: Counter[str] = Counter()
        for event in events:
            kind = self._kind(event, forward)
            if kind is not None:  # the profiler's own events lie outside of the step
                seconds[kind] += event.self_cpu_time_total / 1e6
        return {kind: seconds[kind] for kind in KINDS}

    def _follow(self, module: nn.Module, kind: str) -> None:
        module.register_forward_pre_hook(lambda *_: self._enter(kind))
        # Recomputation ends by an exception, once everything that is needed is there.
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, kind: str) -> None:
        entered = record_function(STEP + kind)
        entered.__enter__()
        self.open.append(entered)

    def _leave(self) -> None:
        self.open.pop().__exit__(None, None, None)

    def _kind(self, event: Any, forward: dict[int, Any]) -> str | None:
        """The kind of an event, by the innermost event around it that has one."""
        sides = {side for shape in event.input_shapes if isinstance(shape, list) for side in shape}
        while event is not None:
            if event.name in _ADAPTED and event.input_shapes[1][-1] in sides:
                return FACTORS  # the second input is the factor (out, R)
            if event.name.startswith(STEP):
                return event.name.removeprefix(STEP)
            if event.name.startswith("Optimizer."):
                return OPTIMIZER
            if event.name.startswith(_BACKWARD) and event.sequence_nr in forward:
                event = forward[event.sequence_nr]
            else:
                event = event.cpu_parent
        return None


def _in_backward(event: Any) -> bool:
    while event is not None and not event.name.startswith(_BACKWARD):
        event = event.cpu_parent
    return event is not None


def _kind_of(path: str) -> str | None:
    """The kind of a module, by its path; None if the module around it has the same."""
    parts = path.split(".")
    if "lora_A" in parts or "lora_B" in parts:
        return FACTORS
    return {"self_attn": ATTENTION, "mlp": MLP}.get(parts[-1])
