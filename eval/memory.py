"""Memory of this process: resident, as Linux counts it, and what torch's tensors take."""

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes now."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes since the last `restart_peak`, or since the process began."""
    return _status("VmHWM")


def restart_peak() -> None:
    """Count the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def tensor_peak(step: Callable[[], None], device: str) -> int:
    """Most bytes that torch's allocator holds on a device while `step` runs, all living tensors included.

    On a CPU the profiler counts every allocation and release of the step, which does not depend on how much the C
    library has kept of memory that was released before. `step` should release nothing that it did not make.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    living = sum(_storages(device).values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = most = living
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _storages(device: str) -> dict[int, int]:
    """Bytes of every storage that a living tensor on a device has, by its address."""
    found = {}
    for item in gc.get_objects():
        if (
            issubclass(type(item), torch.Tensor)
            and item.device.type == device
            and item.layout == torch.strided
        ):
            with suppress(
                RuntimeError
            ):  # what torch.compile traced with has a storage without an address
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return found


def _status(key: str) -> int:
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
