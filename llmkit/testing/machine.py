"""The contract of an allocator as a hypothesis state machine: slower than the walks, but it shrinks what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.testing.ledger import Ledger
from llmkit.testing.schedulers import build_cache
from llmkit.types import Request, SamplingParams

REQUESTS = st.integers(0, 3)
LENGTHS = st.integers(0, 40)


def cache_machine(cache: type[CacheAllocator], options: Mapping[str, Any] | None = None) -> type[RuleBasedStateMachine]:
    """A state machine for `cache`; assign its `TestCase` to a module variable and pytest runs it."""

    class CacheMachine(RuleBasedStateMachine):
        """Four requests share a small pool in every order of operations; two begin alike, the last is a stranger."""

        @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4), lengths=st.lists(LENGTHS, min_size=4))
        def make(self, num_blocks: int, block_size: int, lengths: list[int]) -> None:
            spec = CacheSpec(num_blocks, block_size)
            self.ledger = Ledger(build_cache(cache, spec, options or {}))
            self.requests = []
            for number in range(4):
                self.requests.append(_request(number, 1 + lengths[number] % spec.num_slots))

        @rule(number=REQUESTS, more=st.integers(1, 9))
        def allocate(self, number: int, more: int) -> None:
            request = self.requests[number]
            reach = len(self.ledger.table(request)) * self.ledger.block_size
            num_cached = 0 if reach else self.ledger.match(request)
            self.ledger.allocate(request, min(max(reach, num_cached) + more, request.max_num_tokens))

        @rule(number=REQUESTS, upto=LENGTHS)
        def truncate(self, number: int, upto: int) -> None:
            self.ledger.truncate(self.requests[number], upto)

        @rule(number=REQUESTS)
        def commit(self, number: int) -> None:
            request = self.requests[number]
            reach = len(self.ledger.table(request)) * self.ledger.block_size
            self.ledger.commit(request, min(reach, request.num_tokens))

        @rule(number=REQUESTS)
        def free(self, number: int) -> None:
            self.ledger.free(self.requests[number])

    return CacheMachine


def _request(number: int, num_tokens: int) -> Request:
    """Even ones begin alike, odd ones too; the last belongs to another tenant."""
    params = SamplingParams(max_tokens=1)
    return Request(str(number), [number % 2] * num_tokens, params, tenant=str(number // 3), max_num_tokens=num_tokens)
