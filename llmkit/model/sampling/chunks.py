"""How many rows of logits are worked on at once."""

from __future__ import annotations

import torch
from torch import Tensor

# On a CPU, temporaries that outgrow the caches and the allocator's free list cost more in page faults than the
# arithmetic itself; on a GPU, splitting costs launches, and only memory sets a limit.
MAX_CPU_ELEMENTS = 1 << 18
MAX_GPU_ELEMENTS = 1 << 26


def rows_at_once(num_columns: int, device: torch.device) -> int:
    """Rows of `num_columns` numbers that are best worked on together; at least 1."""
    return max(1, (MAX_CPU_ELEMENTS if device.type == "cpu" else MAX_GPU_ELEMENTS) // num_columns)


def chunks(logits: Tensor) -> list[slice]:
    """Slices that cover the rows of `logits` [R, V]; one empty slice if there are none."""
    step = rows_at_once(logits.shape[1], logits.device)
    return [slice(start, start + step) for start in range(0, max(len(logits), 1), step)]
