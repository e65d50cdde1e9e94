"""How many KV blocks fit, and one clear line when the asked number does not."""

from __future__ import annotations

import os

import torch

from llmkit.errors import CapacityError

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


def choose_num_blocks(asked: int | None, useful: int, block_bytes: int, budget: int, free: int) -> int:
    """Blocks of the pool: what was `asked`, else as many as are `useful` within `budget` bytes.

    Raises CapacityError when the asked number, or even one block, needs more than the `free` bytes.
    """
    fits = free // block_bytes
    if asked is not None:
        if asked > fits:
            raise CapacityError(
                f"engine.num_blocks={asked} needs {asked * block_bytes / 2**30:.2f} GiB of KV cache, "
                f"but {free / 2**30:.2f} GiB are free: num_blocks={fits} would fit"
            )
        return asked
    num_blocks = min(useful, budget // block_bytes, fits)
    if num_blocks < 1:
        raise CapacityError(
            f"no room for a KV cache: one block takes {block_bytes / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; "
            "use a smaller model or block_size, or a larger engine.gpu_memory_utilization / engine.cpu_cache_gib"
        )
    return num_blocks
