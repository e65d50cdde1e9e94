"""The kit bites: each of these seeded bugs in the core or a plugin is found, mostly within a few walks."""

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from llmkit.batching import ContinuousBatching
from llmkit.engine.engine import Engine
from llmkit.engine.planner import Planner
from llmkit.engine.progress import Progress
from llmkit.engine.residency import Residency
from llmkit.engine.scheduling import PlannedStep
from llmkit.testing import check_cache, check_scheduler
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache

Function = Callable[..., Any]

CORE: dict[str, tuple[type, str, str, str]] = {
    "blocks come back while a step in flight names them": (
        Residency, "leave", "if request.last_step_id >= self.num_landed_steps:", "if False:",
    ),
    "blocks come back one step early": (Residency, "land", "self._pinned[0][0] <= step_id", "True"),
    "a slot comes back while a step in flight names it": (
        Residency, "leave", "self._pinned.append(", "self._free_slots.append(slot); self._pinned.append(",
    ),
    "a request that leaves keeps its epoch": (Residency, "leave", "request.epoch, request.slot = 0, -1", "request.slot = -1"),
    "results of an earlier stay are taken in": (Planner, "land", "or request.epoch != epoch", ""),
    "an id counts as free while its blocks are in flight": (
        Residency, "is_pinned", "pinned.request_id == request.request_id", "pinned is request",
    ),
    "computed tokens survive a preemption": (
        Residency, "leave", "request.num_computed_tokens = request.num_in", "request.num_in",
    ),
    "the block table is not sent again after a preemption": (
        Residency, "leave", "request.num_blocks = request.num_sent_blocks = 0", "request.num_blocks = 0",
    ),
    "new blocks are not sent": (Planner, "_compile", "request.num_blocks > request.num_sent_blocks", "not start"),
    "pending samples are not counted": (
        Planner, "_compile", "request.num_tokens + request.num_pending_samples", "request.num_tokens",
    ),
    "tokens in flight are scheduled again": (
        PlannedStep, "run", "start = request.num_computed_tokens + request.num_in_flight_tokens",
        "start = request.num_computed_tokens",
    ),
    "requests run past their length": (PlannedStep, "run", "target >= request.max_num_tokens or", ""),
    "a grant exceeds the token budget": (PlannedStep, "run", "if num_tokens > self.num_free_tokens:", "if False:"),
    "a grant reserves one token too few": (PlannedStep, "run", "upto = start + num_tokens", "upto = start + num_tokens - 1"),
    "the token budget is not charged on admission": (PlannedStep, "_admit", "self.num_free_tokens -= num_tokens", "pass"),
    "a preempted grant still runs": (PlannedStep, "preempt", "self.grants.pop(view, 0)", "self.grants.get(view, 0)"),
    "a failed row is taken for a token": (Engine, "_take_in", "if row in result.errors", "if False and row in result.errors"),
    "admissions of a failed step stay": (PlannedStep, "rollback", "self._residency.leave(view._request)", "pass"),
    "stop tokens end a request before min_tokens": (
        Progress, "add_token", "in self._stop_ids and is_free_to_stop", "in self._stop_ids",
    ),
    "preempted requests lose their place for good": (
        Planner, "_update_queues", "self._waiting.insert(0, view)", "pass",
    ),
}  # fmt: skip

BATCHING: dict[str, tuple[type, str, str, str]] = {
    "nobody makes room": (ContinuousBatching, "_continue", "self._make_room(request, running, step)", "pass"),
    "the oldest gives way to the youngest": (ContinuousBatching, "victim", "candidates[-1]", "candidates[0]"),
    "nobody is admitted beside others": (
        ContinuousBatching, "schedule", "and queue.waiting", "and queue.waiting and step.now % 50 == 49",
    ),
}  # fmt: skip

CACHES: dict[str, tuple[type, str, str, str]] = {
    "one block too few": (PagedCache, "allocate", "-(-upto // self.spec.block_size)", "upto // self.spec.block_size"),
    "not all or nothing": (PagedCache, "allocate", "if num_new > len(self._free):\n        return False", ""),
    "blocks leak": (PagedCache, "free", ", 0)", ", 1)"),
    "truncate takes one block too many": (PagedCache, "truncate", "-(-upto //", "(upto //"),
    "blocks are freed twice": (PagedCache, "_release", "if not self._ref_counts[block]:", "if True:\n            self._free.append(block)"),
    "growth moves the table": (PagedCache, "allocate", "table.append(block)", "table.insert(0, block)"),
    "holes overlap": (ContiguousCache, "allocate", "(start + size, length - size)", "(start + size - 1, length - size + 1)"),
    "holes never merge": (ContiguousCache, "free", "sum(merged[-1]) == start", "False"),
    "a run is freed twice": (ContiguousCache, "free", "self._runs.pop(", "self._runs.get("),
}  # fmt: skip


def mutate(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, old: str, new: str) -> None:
    """Replace `old` by `new` in the source of one method; `old` must occur exactly once."""
    source = textwrap.dedent(inspect.getsource(vars(owner)[name]))
    assert source.count(old) == 1, f"{owner.__name__}.{name} has {source.count(old)} times {old!r}"
    namespace: dict[str, Function] = {}
    exec(
        "from __future__ import annotations\n" + source.replace(old, new),
        vars(sys.modules[owner.__module__]),
        namespace,
    )
    monkeypatch.setattr(owner, name, namespace[name])


@pytest.mark.parametrize("bug", CORE)
def test_bugs_of_the_core_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *CORE[bug])
    with pytest.raises(AssertionError, match="seed"):
        check_cache(PagedCache, seeds=range(60))


@pytest.mark.parametrize("bug", BATCHING)
def test_bugs_of_a_scheduler_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *BATCHING[bug])
    with pytest.raises(AssertionError, match="seed"):
        check_scheduler(ContinuousBatching, seeds=range(60))


@pytest.mark.parametrize("bug", CACHES)
def test_bugs_of_a_cache_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *CACHES[bug])
    with pytest.raises(AssertionError, match="seed"):
        check_cache(CACHES[bug][0], seeds=range(60))
