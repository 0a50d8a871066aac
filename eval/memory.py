"""Memory of this process: resident memory from Linux, and memory of torch's tensors."""

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

STATUS = Path("/proc/self/status")


def resident() -> int:
    """Resident bytes now."""
    return _status("VmRSS")


def peak() -> int:
    """Peak resident bytes since the last `restart_peak`, or since the start of the process."""
    return _status("VmHWM")


def restart_peak() -> None:
    """Restart the count of `peak`."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def living(device: str) -> int:
    """Bytes of torch's living tensors on a device."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return sum(_storages(device).values())


def tensor_peak(step: Callable[[], None], device: str) -> int:
    """Peak bytes of torch's tensors on a device while `step` runs, all living tensors included.

    `step` must not free tensors that it did not allocate.
    """
    peak = TensorPeak(device)
    peak.start()
    step()
    return peak.stop()


class TensorPeak:
    """Peak bytes of torch's tensors on a device between `start` and `stop`.

    All living tensors are included; those that live at the start must live at the end. On a CPU the
    profiler counts every allocation and release, so memory that the C library keeps does not
    matter.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def start(self) -> None:
        """Begin to count."""
        self.held = living(self.device)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()

    def stop(self) -> int:
        """The peak since `start`."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        self.profiler.stop()
        results: Any = self.profiler.profiler
        events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        held = most = self.held
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most


def _storages(device: str) -> dict[int, int]:
    """Bytes of every storage of a living tensor on a device, by address."""
    sizes = {}
    for item in gc.get_objects():
        if (
            issubclass(type(item), torch.Tensor)
            and item.device.type == device
            and item.layout == torch.strided
        ):
            # Tensors from torch.compile's tracing have a storage without an address.
            with suppress(RuntimeError):
                sizes[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sizes


def _status(key: str) -> int:
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
