"""What the kit compares with: the one right continuation of a request, and a cache too simple to be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmkit.interfaces.cache import CacheAllocator, CacheSpec, CacheStats
from llmkit.interfaces.settings import Settings
from llmkit.testing.tags import digests_of, extend, sample
from llmkit.types import FinishReason, Request


def continuation(
    request: Request, vocab_size: int, eos_token_ids: frozenset[int], max_model_len: int
) -> tuple[list[int], FinishReason]:
    """What a request that has not run yet must produce alone or in any company, on a `FakeExecutor`."""
    params = request.sampling_params
    stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
    most = min(request.max_num_tokens, max_model_len) - request.num_prompt_tokens
    tokens: list[int] = []
    digest = digests_of(request.token_ids)[-1]
    while len(tokens) < most:
        tokens.append(sample(request.seed, digest, vocab_size))
        if tokens[-1] in stops and len(tokens) >= params.min_tokens:
            return tokens, FinishReason.STOP
        digest = extend(digest, tokens[-1])
    return tokens, FinishReason.LENGTH


class ReferenceCache(CacheAllocator):
    """Scatters blocks over the whole pool, so that no neighbour is ever right by accident."""

    reserves: ClassVar[bool] = False

    def __init__(self, settings: Settings, spec: CacheSpec) -> None:
        super().__init__(settings, spec)
        self._free = set(range(spec.num_blocks))
        self._tables: dict[str, list[int]] = {}
        self._num_taken = 0

    def allocate(self, request: Request, upto: int) -> bool:
        table = self._tables.get(request.request_id, [])
        if self.reserves:
            upto = max(upto, request.max_num_tokens)
        num_new = -(-upto // self.spec.block_size) - len(table)
        if num_new > len(self._free):
            return False
        for _ in range(num_new):
            self._num_taken += 7
            block = min(self._free, key=lambda free: (free - self._num_taken) % self.spec.num_blocks)
            self._free.remove(block)
            table.append(block)
        if table:
            self._tables[request.request_id] = table
        return True

    def truncate(self, request: Request, upto: int) -> None:
        table = self._tables.get(request.request_id, [])
        keep = -(-upto // self.spec.block_size)
        self._free.update(table[keep:])
        del table[keep:]

    def free(self, request: Request) -> None:
        self._free.update(self._tables.pop(request.request_id, []))

    def block_table(self, request: Request) -> Sequence[int]:
        return self._tables.get(request.request_id, ())

    def stats(self) -> CacheStats:
        num_free = len(self._free)
        return CacheStats(self.spec.num_blocks - num_free, 0, num_free)

    def census(self) -> dict[int, tuple[str, ...]]:
        return {block: (request_id,) for request_id, table in self._tables.items() for block in table}


class ReservingCache(ReferenceCache):
    """Takes the blocks of a request's full length when it starts, as a contiguous layout must; they never grow."""

    reserves = True

    def truncate(self, request: Request, upto: int) -> None:
        return None
