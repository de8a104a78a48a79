"""How much memory a process has needed at most, as the system or the GPU's allocator tells it."""

import os
from pathlib import Path

import torch


class PeakMemory:
    """Bytes that a piece of work took beyond what the process held before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            self._before = _reset_resident_peak()

    def bytes(self) -> int | None:
        """Peak so far; None where the system does not tell."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self._device) - self._before)
        peak = _resident("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def _reset_resident_peak() -> int | None:
    """Linux: forget the process's peak; returns what it holds now."""
    try:
        Path(f"/proc/{os.getpid()}/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
