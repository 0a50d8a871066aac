"""Names of PEFT that qrefta looks for, in release 0.21."""

import inspect

__all__ = ["prepares_for_kbit_training"]

_FRAMES = 6  # from an assignment to a parameter's `requires_grad` up to PEFT's loop


def prepares_for_kbit_training() -> bool:
    """Whether PEFT's `prepare_model_for_kbit_training` is among the callers.

    It freezes every parameter of a model, and offers no hook to refuse it. If it goes: a model
    whose factors are frozen warns in its first forward pass in training mode.
    """
    frame = inspect.currentframe()
    for _ in range(_FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_name == "prepare_model_for_kbit_training":
            return True
        frame = frame.f_back
    return False
