"""The oracle and the fault cells bite: bugs in packing, in landing and in containment are found, one by one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from llmkit.engine.engine import Engine, _InFlight
from llmkit.engine.inputs import InputBuilder, slots_and_starts
from llmkit.engine.planner import Planner
from llmkit.engine.residency import Residency
from llmkit.engine.steady import is_decoding
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.testing.walk import Walk
from llmkit.testing.worlds import draw_world
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous
from tests.nightly.faults import Cell, run_cell
from tests.testing.test_mutants import Bug, plant

INPUTS: dict[str, Bug] = {
    "positions start one late": (
        InputBuilder.build,
        "np.repeat(starts - ends + lens, lens)",
        "np.repeat(starts - ends + lens + 1, lens)",
    ),
    "chunks start over": (InputBuilder.build, "np.repeat(starts - ends + lens, lens)", "np.repeat(lens - ends, lens)"),
    "tokens are another row's": (InputBuilder.build, "np.repeat(slots, lens)", "np.repeat(slots[::-1], lens)"),
    "blocks are looked up one late": (
        InputBuilder.build,
        "positions // self.block_size",
        "-(-positions // self.block_size) * (positions > 0)",
    ),
    "all rows write into the first one's blocks": (
        InputBuilder.build,
        "self.block_tables[token_slots,",
        "self.block_tables[token_slots * 0 + slots[0],",
    ),
    "keys are one too few": (InputBuilder.build, "(starts + lens).astype", "(starts + lens - 1).astype"),
    "keys go one slot too far": (InputBuilder.build, "+ offsets,", "+ (offsets + 1) % self.block_size,"),
    "logits are of the token before": (
        InputBuilder.build,
        "ends[list(sampling)] - 1",
        "np.maximum(ends[list(sampling)] - 2, 0)",
    ),
    "everybody samples": (InputBuilder.build, "if row.samples]", "if True]"),
    "new blocks are not cleared": (InputBuilder.build, "token_blocks[offsets == 0]", "token_blocks[offsets == 1]"),
    "short tables go on with zeros": (InputBuilder._tables, "tables, tables[:, :1])", "tables, 0)"),
    "tables are cut one block short": (
        InputBuilder._tables,
        "num_blocks[:, None], tables,",
        "num_blocks[:, None] - 1, tables,",
    ),
    "tables go by row, not by slot": (
        InputBuilder._tables,
        "self.block_tables[slots,",
        "self.block_tables[np.arange(len(slots)),",
    ),
    "edits start at the table's beginning": (InputBuilder.apply, "start : start + len(blocks)", ": len(blocks)"),
    "edits for growth are lost": (
        InputBuilder.apply,
        "self.block_tables[slot,",
        "if not start: self.block_tables[slot,",
    ),
    "edits for a table that stood before are lost": (
        InputBuilder.apply,
        "self.block_tables[slot,",
        "if start or not self.block_tables[slot].any(): self.block_tables[slot,",
    ),
    "two blocks of an edit are swapped": (InputBuilder.apply, "= blocks", "= blocks[::-1]"),
    "repeated steps stand still": (slots_and_starts, "starts + rows.shift", "starts"),
}

FAULTS: dict[str, tuple[Bug, Cell]] = {
    "an output that fails cuts landing short": (
        (Engine._hear, "except BaseException as fault:", "except ZeroDivisionError as fault:"),
        Cell("heed", 1, ValueError, 1, 5),
    ),
    "an observer that fails cuts landing short": (
        (Engine._finish, "except BaseException as fault:", "except ZeroDivisionError as fault:"),
        Cell("request_finished", 1, OSError, 0, 5),
    ),
    "publishing that fails cuts landing short": (
        (Residency.publish, "except BaseException as fault:", "except ZeroDivisionError as fault:"),
        Cell("commit", 1, MemoryError, 1, 5),
    ),
    "an interrupted step is lost": (
        (
            Engine._land_all_but,
            "result = self._in_flight[0].result()\n        self._land(self._in_flight.popleft(), result)",
            "step = self._in_flight.popleft()\n        self._land(step, step.result())",
        ),
        Cell("wait", 3, KeyboardInterrupt, 1, 5),
    ),
    "steps run behind an interrupted launch": (
        (Engine.step, "if self._has_failed():\n        self", "if False:\n        self"),
        Cell("launch", 3, KeyboardInterrupt, 2, 5),
    ),
    "steps run behind a failed launch": (
        (Engine._has_failed, "self._in_flight[-1].fault is not None", "False"),
        Cell("launch", 3, ValueError, 2, 5),
    ),
    "a failed step fails nobody": (
        (_InFlight.result, "errors=dict.fromkeys(range(len(self.plan.scheduled)), message)", "errors={}"),
        Cell("wait", 2, ValueError, 0, 5),
    ),
    "blocks that were not freed are forgotten": (
        (Residency.leave, "self._pinned.appendleft(", "("),
        Cell("free", 1, ValueError, 0, 5),
    ),
    "a step that could not be planned stays planned": (
        (Planner.plan, "step.rollback()", "pass"),
        Cell("schedule, at its end", 1, ValueError, 0, 5),
    ),
    "repetition goes on after a fault": (
        (Planner._repeat, "self._end_repeating()\n        raise", "raise"),
        Cell("allocate", 2, StopIteration, 2, 637),
    ),
    "blocks of a step that failed never reach the device": (
        (is_decoding, "request.num_sent_blocks != request.num_blocks", "False"),
        Cell("allocate", 2, StopIteration, 2, 637),
    ),
}


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.mutant
@pytest.mark.parametrize("bug", INPUTS)
def test_bugs_of_packing_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, INPUTS[bug])
    with pytest.raises(AssertionError, match="seed"):
        for seed in range(60):
            world = replace(draw_world(seed), packs=True)
            scheduler = build_scheduler(Continuous, world.scheduler_options, {})
            Walk(world, scheduler, build_cache(PagedCache, world.spec, {}), depth=seed % 3).run()


@pytest.mark.mutant
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("bug", FAULTS)
def test_faults_that_spread_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, cell = FAULTS[bug]
    assert run_cell(cell, Continuous, PagedCache), "without the bug the fault is contained"
    plant(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        run_cell(cell, Continuous, PagedCache)
