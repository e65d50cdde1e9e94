"""What is free on a device."""

from __future__ import annotations

import os

import torch

ACTIVATION_RESERVE = 2 << 30
"""Bytes kept free on a GPU for activations and logits."""


def free_bytes(device: torch.device, gpu_memory_utilization: float) -> int:
    """Bytes a KV pool may take on `device` now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(free - (1 - gpu_memory_utilization) * total) - ACTIVATION_RESERVE)
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
