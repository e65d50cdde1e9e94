"""Models with layers of unlike windows: any cache as one with several groups, and the oracle for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from llmkit.engine.grouped_cache import GroupedCache
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.executor import PendingStep
from llmkit.interfaces.settings import Settings as AnySettings
from llmkit.testing.oracle import OracleExecutor
from llmkit.types import StepPlan, StepResult


def grouped(cache: type[CacheAllocator], has_small_pools: bool = True) -> type[CacheAllocator]:
    """A cache of two or three groups, each of class `cache`, for use with every check of the kit.

    The first has the pool and the window that are asked for; windows of the others are narrower, and drawn. With
    `has_small_pools` so are their pools: mostly they hold a window and a block, but not what the first one's holds.
    """

    class Grouped(GroupedCache):
        Settings = cache.Settings

        def __init__(self, settings: AnySettings, spec: CacheSpec) -> None:
            super().__init__([cache(settings, one) for one in _specs(spec, has_small_pools)])

    Grouped.__name__ = f"Grouped{cache.__name__}"
    return Grouped


def _specs(spec: CacheSpec, has_small_pools: bool) -> list[CacheSpec]:
    random, specs = Random(str(spec)), [spec]
    widest = spec.num_slots if spec.window is None else spec.window - 1
    for _ in range(random.randint(1, 2)):
        window = random.randint(1, max(1, min(widest, specs[-1].window or widest)))
        least = min(spec.num_blocks, -(-window // spec.block_size) + random.choice((0, 1, 1, 1)))
        num_blocks = random.randint(least, spec.num_blocks) if has_small_pools else spec.num_blocks
        specs.append(replace(spec, num_blocks=num_blocks, window=window))
    return specs


@dataclass(slots=True)
class GroupedOracle:
    """Runs every step on the `executors` of all groups, which must agree on what comes of it."""

    executors: Sequence[OracleExecutor]

    def launch(self, plan: StepPlan) -> PendingStep:
        """Run `plan` at once; AssertionError if a query of any group reads a tag that is not of its own prefix."""
        others = len(self.executors) - 1
        assert len(plan.more_edits) in (0, others), f"edits of {len(plan.more_edits)} further groups, of {others}"
        return _Pending([one.launch(plan.of_group(number)) for number, one in enumerate(self.executors)])


@dataclass(frozen=True, slots=True)
class _Pending:
    parts: Sequence[PendingStep]

    def wait(self) -> StepResult:
        """The result of all."""
        first, *others = [part.wait() for part in self.parts]
        assert all(other == first for other in others), f"groups disagree: {[first, *others]}"
        return first
