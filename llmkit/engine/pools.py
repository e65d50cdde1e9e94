"""Pools of KV blocks, one for each group of layers with one window where that saves something, and who divides them."""

from __future__ import annotations

import logging
from typing import Any

from llmkit.engine.grouped_attention import GroupedAttention, backends_of, divide, layer_groups
from llmkit.engine.grouped_cache import GroupedCache, groups_of
from llmkit.engine.memory import blocks_of_window, divide_blocks
from llmkit.interfaces.attention import AttentionBackend, AttentionRequirements
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.scheduler import SchedulerSettings

log = logging.getLogger(__name__)


def window_of(requirements: AttentionRequirements) -> int | None:
    """How many keys a query sees at most in any layer, its own included; None if a layer sees all."""
    windows = [layer.window for layer in requirements.layers]
    known = [window for window in windows if window is not None]
    return max(known) if known and len(known) == len(windows) else None


def windows_of(backend: AttentionBackend) -> list[int | None]:
    """The window of each group of layers, of which there mostly is one."""
    if isinstance(backend, GroupedAttention):
        return [group.window for group in backend.groups]
    return [window_of(backend.requirements)]


def grouped(backend: AttentionBackend, reach: int) -> AttentionBackend:
    """One backend for each group of layers behind one, if sequences of up to `reach` tokens outgrow unlike windows."""
    groups = layer_groups(backend.requirements, reach)
    return GroupedAttention(backend, groups, divide(backend, groups)) if len(groups) > 1 else backend


def build_allocator(
    cache: tuple[type[CacheAllocator], Any],
    backend: AttentionBackend,
    num_blocks: int,
    useful: int,
    limits: SchedulerSettings,
    depth: int,
) -> CacheAllocator:
    """An allocator of `num_blocks`, `useful` at most; of several groups one each, in the memory that those would take.

    A group behind the first gets what windows of all requests and the prompts of a step take. Where prefixes are reused
    it gets at least half of what it would have without groups: what it has not kept is no prefix for the others either.
    """
    block_size = backend.requirements.block_size
    allocator = cache[0](cache[1], CacheSpec(num_blocks, block_size, window_of(backend.requirements)))
    if not isinstance(backend, GroupedAttention):
        return allocator
    num_ahead = (1 + depth) * -(-limits.max_num_batched_tokens // block_size)
    num_kept = num_blocks // 2 if allocator.reuses_prefixes else 0
    needs = [blocks_of_window(group.window, block_size) for group in backend.groups[1:]]
    wanted = [max(num_kept, limits.max_num_seqs * need + num_ahead) for need in needs]
    sizes = divide_blocks(num_blocks, useful, wanted, [one.bytes_per_block() for one in backend.backends])
    specs = [CacheSpec(*pair) for pair in zip(sizes, [block_size] * len(sizes), windows_of(backend), strict=True)]
    return GroupedCache([cache[0](cache[1], spec) for spec in specs])


def allocate_pools(backend: AttentionBackend, allocator: CacheAllocator) -> None:
    """Memory for the blocks that `allocator` divides, of every group."""
    specs = [group.spec for group in groups_of(allocator)]
    for one, spec in zip(backends_of(backend), specs, strict=True):
        one.allocate(spec.num_blocks)
    if len(specs) > 1:
        log.info("blocks of layers, by window: %s", [(spec.window, spec.num_blocks) for spec in specs])
