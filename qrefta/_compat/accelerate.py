"""Private names of accelerate. The module `accelerate.state` is only partly documented."""

from accelerate.state import AcceleratorState, is_initialized

__all__ = ["accelerator_state"]


def accelerator_state() -> AcceleratorState | None:
    """The state of the `Accelerator` of this process; None if there is none yet.

    `AcceleratorState()` alone would create it, with settings that a later `Accelerator` cannot
    change. Used to refuse FSDP1 and ZeRO-3. In 1.1 or earlier. If it goes: check the launcher's
    environment variables only.
    """
    return AcceleratorState() if is_initialized() else None
