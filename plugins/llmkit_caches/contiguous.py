"""Contiguous KV cache: each request reserves one run of consecutive blocks for its full length when it starts.

Simple addressing and no growth while running, at the price of memory held for tokens that may never come.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmkit import CacheAllocator, CacheSpec, CacheStats, Request, Settings


class ContiguousCache(CacheAllocator):
    """First-fit over a sorted list of free runs; neighbours are merged when a run comes back."""

    def __init__(self, settings: Settings, spec: CacheSpec) -> None:
        super().__init__(settings, spec)
        self._holes: list[tuple[int, int]] = [(0, spec.num_blocks)]
        self._runs: dict[str, range] = {}
        self._num_used = 0

    def allocate(self, request: Request, upto: int) -> bool:
        run = self._runs.get(request.request_id)
        if run is not None:
            return upto <= len(run) * self.spec.block_size
        size = -(-max(upto, request.max_num_tokens) // self.spec.block_size)
        for index, (start, length) in enumerate(self._holes):
            if length >= size:
                self._holes[index : index + 1] = [(start + size, length - size)] if length > size else []
                self._runs[request.request_id] = range(start, start + size)
                self._num_used += size
                return True
        return False

    def truncate(self, request: Request, upto: int) -> None:
        """The reservation is for the full length, so nothing is given back before `free`."""
        return None

    def free(self, request: Request) -> None:
        run = self._runs.pop(request.request_id, None)
        if run is None:
            return
        self._num_used -= len(run)
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._holes, (run.start, len(run))]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._holes = merged

    def block_table(self, request: Request) -> Sequence[int]:
        return self._runs.get(request.request_id, ())

    def stats(self) -> CacheStats:
        return CacheStats(self._num_used, 0, self.spec.num_blocks - self._num_used)

    def census(self) -> dict[int, tuple[str, ...]]:
        return {block: (request_id,) for request_id, run in self._runs.items() for block in run}

    def check(self) -> None:
        super().check()
        assert sum(len(run) for run in self._runs.values()) == self._num_used, "two requests share a block"
        spans = sorted([*self._holes, *((run.start, len(run)) for run in self._runs.values())])
        end = 0
        for start, length in spans:
            assert start == end and length > 0, f"gap or overlap at block {end}: {spans}"
            end = start + length
        assert end == self.spec.num_blocks, "blocks are missing at the end of the pool"
