"""How many KV blocks fit, and one clear line when the asked number does not."""

from __future__ import annotations

from collections.abc import Sequence

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


def blocks_of_window(window: int | None, block_size: int) -> int:
    """Most blocks that a decoding request holds of layers with `window`, released where one becomes full."""
    assert window is not None, "layers that see all hold every block"
    return -(-max(window - 1, block_size) // block_size) + 2


def divide_blocks(num_blocks: int, useful: int, wanted: Sequence[int], block_bytes: Sequence[int]) -> list[int]:
    """Blocks for each group of layers, in the memory that `num_blocks` of every group would take.

    Groups behind the first get what they have `wanted`, `num_blocks` at most; the first gets the rest, as far as that
    is `useful`. So none has less than without the division, unless it wants less. `block_bytes` are those of one block
    of each group.
    """
    sizes = [min(num_blocks, most) for most in wanted]
    saved = sum((num_blocks - size) * each for size, each in zip(sizes, block_bytes[1:], strict=True))
    return [max(num_blocks, min(useful, num_blocks + saved // block_bytes[0])), *sizes]
