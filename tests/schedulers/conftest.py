"""A scheduler at work on the fake executor, and what it did in each step."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest

from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.clock import VirtualClock
from llmkit.interfaces.scheduler import Scheduler
from llmkit.testing import FakeExecutor, continuation
from llmkit.types import Request, SamplingParams
from llmkit_caches.paged import PagedCache

VOCAB_SIZE = 1000


class Stage:
    """One virtual second per step."""

    def __init__(
        self,
        scheduler: type[Scheduler],
        *,
        cache: type[CacheAllocator] = PagedCache,
        cache_options: Mapping[str, Any] = MappingProxyType({}),
        num_blocks: int = 64,
        depth: int = 0,
        **options: Any,
    ) -> None:
        self.clock = VirtualClock()
        allocator = cache(cache.Settings(**cache_options), CacheSpec(num_blocks, 4))
        planner = Planner(scheduler(scheduler.Settings(**options)), allocator)
        self.executor = FakeExecutor(4, VOCAB_SIZE)
        limits = EngineLimits(VOCAB_SIZE, num_blocks * 4)
        self.engine = Engine(planner, self.executor, limits, self.clock, depth=depth)
        self.ended: dict[str, float] = {}
        self.num_preemptions: dict[str, int] = {}
        self.num_recomputed: dict[str, int] = {}
        self.errors: dict[str, str] = {}

    def add(self, name: str, num_prompt: int = 4, max_tokens: int = 4, **fields: Any) -> None:
        fields.setdefault("arrival_time", self.clock.now())
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        prompt = fields.pop("prompt", [ord(name[-1])] * num_prompt)
        self.engine.add(Request(name, prompt, params, **fields))

    def add_unforeseen(self, name: str, num_tokens: int) -> None:
        """A request that stops after `num_tokens` tokens, which only the last of them shows."""
        prompt, params = [ord(name)] * 4, SamplingParams(max_tokens=50, ignore_eos=True)
        tokens, _ = continuation(Request(name, prompt, params), VOCAB_SIZE, frozenset(), 1 << 30)
        last = tokens[num_tokens - 1]
        assert last not in tokens[: num_tokens - 1]
        self.engine.add(Request(name, prompt, params.model_copy(update={"stop_token_ids": (last,)})))

    def step(self) -> dict[str, int]:
        """Tokens each request got in this step, in plan order."""
        before = self.executor.num_steps
        for output in self.engine.step():
            if output.error is not None:
                self.errors[output.request_id] = output.error
            if output.completion is not None:
                self.ended[output.request_id] = self.clock.now()
                self.num_preemptions[output.request_id] = output.completion.metrics.num_preemptions
                self.num_recomputed[output.request_id] = output.completion.metrics.num_recomputed_tokens
        self.clock.advance(1.0)
        if self.executor.num_steps == before:
            return {}
        return {row.request_id: row.num_tokens for row in self.executor.history[-1].scheduled}

    def steps(self) -> list[dict[str, int]]:
        """To the end."""
        taken = []
        while self.engine.has_unfinished:
            taken.append(self.step())
        return taken


@pytest.fixture
def make_stage() -> Callable[..., Stage]:
    return Stage
