"""The oracle bites: bugs in what is copied to host memory and back are found by ordinary walks."""

from __future__ import annotations

import pytest

from llmkit.engine.planner import Planner
from llmkit.engine.residency import Residency
from llmkit.engine.scheduling import PlannedStep
from llmkit.engine.swapping import HostPool
from llmkit.testing import check_cache
from llmkit_caches.paged import PagedCache
from tests.testing.test_mutants import Bug, plant

SWAPPING: dict[str, Bug] = {
    "the block that is not full is left out": (
        HostPool.save,
        "-(-num_tokens // self._block_size)",
        "num_tokens // self._block_size",
    ),
    "what is in flight counts as saved": (
        HostPool.save,
        "request.num_computed_tokens",
        "request.num_computed_tokens + request.num_in_flight_tokens",
    ),
    "host blocks are lent twice": (HostPool.save, "self._free.pop() for _", "self._free[-1 - _] for _"),
    "saves are not made": (HostPool.copies, "tuple(saves), tuple(restores)", "(), tuple(restores)"),
    "saves are put off for a step": (
        HostPool.copies,
        "self._to_save.clear()",
        "self._to_save.clear() if step_id % 2 else saves.clear()",
    ),
    "restores start at the first block missing": (
        HostPool.copies,
        "[back.num_reused_blocks :]",
        "[back.num_reused_blocks + 1 :]",
    ),
    "restores go to the next block": (
        HostPool.copies,
        "zip(back.host_blocks, table, strict=False)",
        "zip(back.host_blocks, table[1:], strict=False)",
    ),
    "who ends keeps its host memory": (HostPool.drop, "self._free += reversed(kept.host_blocks)", "pass"),
    "what the pool has is forgotten": (
        HostPool.start,
        "num_cached_tokens // self._block_size",
        "len(kept.host_blocks)",
    ),
    "nothing is dropped at the end": (Planner.finish, "self.host.drop(request)", "pass"),
    "who never ran again is saved again": (
        PlannedStep.preempt,
        "self.admitted.remove(view)",
        "self.admitted.remove(view); self._residency.save(request)",
    ),
    "a start is not announced": (
        Residency.enter,
        "self.host.start(request, found.num_pooled if",
        "self.host.start(request, 10**6 if",
    ),
    "resumes behind what is saved and one": (
        Residency.find,
        "self.num_saved_tokens(request))",
        "self.num_saved_tokens(request) + 1)",
    ),
}


@pytest.mark.mutant
@pytest.mark.parametrize("bug", SWAPPING)
def test_bugs_of_swapping_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, SWAPPING[bug])
    with pytest.raises(AssertionError, match="seed"):
        check_cache(PagedCache, seeds=range(100))
