"""The oracle bites: bugs in what forks share and copy are found by ordinary walks."""

from __future__ import annotations

import pytest

from llmkit.engine import forks
from llmkit.engine.forks import Forks
from llmkit.engine.planner import Planner
from llmkit.engine.residency import Residency
from llmkit.engine.scheduling import PlannedStep
from llmkit.testing import check_cache
from llmkit_caches.paged import PagedCache
from llmkit_caches.sharing import SharingCache
from tests.testing.test_mutants import Bug, plant

FORKS: dict[str, Bug] = {
    "nothing is copied": (Planner._copies, "if not any(forks):", "if True:"),
    "copies come a step late": (
        Planner._copies,
        "copies = None",
        "copies = None; self.late, forks = forks, getattr(self, 'late', [])",
    ),
    "only the first fork of a step is copied": (Planner._copies, "in step.admitted if", "in step.admitted[:1] if"),
    "another block is copied": (SharingCache.fork, "BlockCopy(theirs[num_shared]", "BlockCopy(theirs[num_shared - 1]"),
    "a block is copied elsewhere": (SharingCache.fork, ", table[num_shared], num_left", ", table[-1], num_left"),
    "one token is not copied": (SharingCache.fork, "num_left),)", "num_left - 1),)"),
    "more is copied than is shared": (SharingCache.fork, "num_left),)", "self.spec.block_size),)"),
    "the block that both write into is shared": (
        SharingCache.fork,
        "= divmod(num_tokens, self.spec.block_size)",
        "= -(-num_tokens // self.spec.block_size), 0",
    ),
    "shared blocks are not counted": (SharingCache.fork, "self._ref_counts[block] += 1", "pass"),
    "a fork is not all or nothing": (SharingCache.fork, "return None", "pass"),
    "shared blocks count as unpublished": (SharingCache.fork, "num_shared if self._is_on else 0", "0"),
    "what is released counts as held": (SharingCache.fork, "if num_released:", "if False:"),
    "what the parent has released is shared": (Forks._holds, "return all(", "return True or all("),
    "the last token is not run": (Forks.find, "request.num_tokens - 1", "request.num_tokens"),
    "who has computed half of the prompt is a parent": (
        forks.is_computed,
        "request.num_computed_tokens >= request.num_prompt_tokens",
        "request.num_computed_tokens",
    ),
    "who starts in the same step is a parent": (forks.is_computed, "request.num_ready_tokens <", "0 <"),
    "a fork counts as reused only": (Residency.find, "fork.num_tokens, fork.num_tokens,", "0, fork.num_tokens,"),
    "blocks of a fork are not counted": (Residency.start, "self._count_blocks(request)", "pass"),
    "a refused fork is granted": (PlannedStep._admit, "if copies is None:", "if False:"),
}


LATE = ("shared blocks count as unpublished", "who starts in the same step is a parent")
"""Bugs that few walks meet."""


@pytest.mark.mutant
@pytest.mark.parametrize("bug", [pytest.param(bug, marks=pytest.mark.slow) if bug in LATE else bug for bug in FORKS])
def test_bugs_of_forks_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, FORKS[bug])
    with pytest.raises(AssertionError, match="seed"):
        check_cache(PagedCache, options={"prefix": False}, seeds=range(40))
        check_cache(PagedCache, seeds=range(60))
