"""How many KV blocks fit, and one clear line when the asked number does not."""

from __future__ import annotations

from llmkit.errors import CapacityError


def choose_num_blocks(asked: int | None, useful: int, block_bytes: int, budget: int, free: int) -> int:
    """Blocks of the pool: what was `asked`, else as many as are `useful` within `budget` bytes.

    Raises CapacityError when the asked number, or even one block, needs more than the `free` bytes.
    """
    fits = free // block_bytes
    if asked is not None and 0 < fits < asked:
        raise CapacityError(
            f"engine.num_blocks={asked} needs {asked * block_bytes / 2**30:.2f} GiB of KV cache, "
            f"but {free / 2**30:.2f} GiB are free: num_blocks={fits} would fit"
        )
    num_blocks = min(useful, budget // block_bytes, fits) if asked is None else min(asked, fits)
    if num_blocks < 1:
        raise CapacityError(
            f"no room for a KV cache: one block takes {block_bytes / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free "
            "beside weights and steps; use a smaller model, block_size or scheduler.max_num_batched_tokens, or more "
            "engine.gpu_memory_utilization / engine.cpu_cache_gib"
        )
    return num_blocks
