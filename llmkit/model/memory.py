"""What is free on a device, and what work on it takes."""

from __future__ import annotations

import os
from typing import Protocol

import torch


class Meter(Protocol):
    """Reads a device's memory."""

    def start(self) -> None:
        """Forget what was taken before; what nobody holds goes back to the device."""
        ...

    def taken(self) -> int:
        """Most bytes taken since `start`, beyond what was held then."""
        ...


class CudaMeter:
    """By torch's allocator, with what fragments cost."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = 0

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._held = torch.cuda.memory_reserved(self._device)

    def taken(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - self._held


def meter_of(device: torch.device) -> Meter | None:
    """None where memory is not given to the pool as a whole."""
    return CudaMeter(device) if device.type == "cuda" else None


def free_bytes(device: torch.device, gpu_memory_utilization: float) -> int:
    """Bytes that may be taken on `device` now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1 - gpu_memory_utilization) * total))
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
