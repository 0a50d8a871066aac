"""Private names of accelerate. The module `accelerate.state` is only partly documented."""

from accelerate.state import AcceleratorState, is_initialized
from torch import nn

__all__ = ["accelerator_state", "runs_own_forward"]


def accelerator_state() -> AcceleratorState | None:
    """The state of the `Accelerator` of this process; None if there is none yet.

    `AcceleratorState()` alone would create it, with settings that a later `Accelerator` cannot
    change. Used to refuse FSDP1 and ZeRO-3. In 1.1 or earlier. If it goes: check the launcher's
    environment variables only.
    """
    return AcceleratorState() if is_initialized() else None


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class.

    accelerate's hooks, by which `device_map` moves inputs, replace it and keep the one before as
    `_old_forward`, which they call. If it goes: the layers of a model with such hooks stay dense.
    """
    placed = vars(module)
    forward = placed.get("_old_forward" if "_hf_hook" in placed else "forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward
