"""How many rows of logits are worked on at once."""

from __future__ import annotations

from torch import Tensor

# On a CPU, temporaries that outgrow the caches and the allocator's free list cost more in page faults than the
# arithmetic itself; on a GPU, splitting costs launches, and only memory sets a limit.
MAX_CPU_ELEMENTS = 1 << 18
MAX_GPU_ELEMENTS = 1 << 26


def chunks(logits: Tensor) -> list[slice]:
    """Slices that cover the rows of `logits` [R, V]; one empty slice if there are none."""
    num_rows, num_columns = logits.shape
    limit = MAX_CPU_ELEMENTS if logits.device.type == "cpu" else MAX_GPU_ELEMENTS
    step = max(1, limit // num_columns)
    return [slice(start, start + step) for start in range(0, max(num_rows, 1), step)]
