"""Resident memory of this process, as Linux counts it."""

from pathlib import Path

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


def _status(key: str) -> int:
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
