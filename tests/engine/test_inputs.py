"""Packed inputs against the same arrays computed row by row, in plain Python."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest

from llmkit.engine.inputs import InputBuilder, PackedInputs
from llmkit.rows import DecodeRows, Lineup
from llmkit.types import BlockTableEdit, ScheduledRequest, StepPlan

DTYPES = {
    "row_slots": np.int64,
    "query_start_loc": np.int32,
    "seq_lens": np.int32,
    "block_table": np.int32,
    "token_slots": np.int64,
    "positions": np.int64,
    "slot_mapping": np.int64,
    "logit_tokens": np.int64,
    "fresh_blocks": np.int64,
}


def row(slot: int, start: int, num_tokens: int, samples: bool = True) -> ScheduledRequest:
    return ScheduledRequest(f"r{slot}", slot, start, num_tokens, samples, 0)


def naive(rows: list[ScheduledRequest], tables: dict[int, list[int]], block_size: int) -> dict[str, Any]:
    """What `InputBuilder.build` must give; `tables` holds the blocks of each slot."""
    width = max(-(-(r.start + r.num_tokens) // block_size) for r in rows)
    out: dict[str, Any] = {name: [] for name in DTYPES} | {"sampling_rows": [], "query_lens": []}
    out["query_start_loc"] = [0]
    for index, r in enumerate(rows):
        out["row_slots"].append(r.slot)
        out["query_lens"].append(r.num_tokens)
        out["seq_lens"].append(r.start + r.num_tokens)
        num_blocks = -(-(r.start + r.num_tokens) // block_size)
        own = tables[r.slot][:num_blocks]
        out["block_table"].append(own + own[:1] * (width - num_blocks))
        for position in range(r.start, r.start + r.num_tokens):
            out["token_slots"].append(r.slot)
            out["positions"].append(position)
            block, offset = divmod(position, block_size)
            out["slot_mapping"].append(tables[r.slot][block] * block_size + offset)
            out["fresh_blocks"] += [tables[r.slot][block]] if offset == 0 else []
        out["query_start_loc"].append(len(out["positions"]))
        if r.samples:
            out["sampling_rows"].append(index)
            out["logit_tokens"].append(len(out["positions"]) - 1)
    return out


def assert_equal(packed: PackedInputs, wanted: dict[str, Any]) -> None:
    for field in fields(packed):
        got = getattr(packed, field.name)
        if field.name in DTYPES:
            assert got.dtype == DTYPES[field.name], field.name
            got = got.tolist()
        assert list(got) == wanted[field.name], field.name


@dataclass
class World:
    """Slots whose sequences start, grow block by block and end; knows every slot's whole block table."""

    rng: random.Random
    max_num_seqs: int
    max_model_len: int
    block_size: int

    def __post_init__(self) -> None:
        self.builder = InputBuilder(self.max_num_seqs, self.max_model_len, self.block_size)
        self.width = -(-self.max_model_len // self.block_size)
        self.tables = {slot: [0] * self.width for slot in range(self.max_num_seqs)}
        self.lengths = dict.fromkeys(range(self.max_num_seqs), 0)
        self.num_blocks = dict.fromkeys(range(self.max_num_seqs), 0)

    def plan(self, step_id: int, is_decode: bool) -> StepPlan:
        rng = self.rng
        rows, edits = [], []
        for slot in rng.sample(range(self.max_num_seqs), rng.randint(1, self.max_num_seqs)):
            if self.lengths[slot] == self.max_model_len or rng.random() < 0.1:
                self.lengths[slot] = self.num_blocks[slot] = 0
            start = self.lengths[slot]
            num_tokens = 1 if is_decode else min(rng.choice([1, 1, 2, 5, 40]), self.max_model_len - start)
            rows.append(row(slot, start, num_tokens, rng.random() < 0.7))
            edits += self.grow(slot, start + num_tokens)
        return StepPlan(step_id, tuple(rows), edits=tuple(edits))

    def grow(self, slot: int, length: int) -> list[BlockTableEdit]:
        """Blocks the slot lacks, in one edit or two, and sometimes more of them than it needs now."""
        held, wanted = self.num_blocks[slot], -(-length // self.block_size)
        self.lengths[slot] = length
        if wanted <= held:
            return []
        wanted = min(self.width, wanted + self.rng.randint(0, 2))
        new = [self.rng.randrange(10_000) for _ in range(wanted - held)]
        self.tables[slot][held:wanted], self.num_blocks[slot] = new, wanted
        cut = self.rng.randint(1, len(new))
        parts = [(held, new[:cut]), (held + cut, new[cut:])]
        return [BlockTableEdit(slot, start, tuple(blocks)) for start, blocks in parts if blocks]


@pytest.mark.parametrize("seed", range(12))
def test_random_plans(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, rng.choice([1, 3, 16]), rng.choice([1, 17, 64, 100]), rng.choice([1, 3, 16]))
    for step_id in range(60):
        plan = world.plan(step_id, is_decode=step_id % 3 == 0)
        packed = pack(world.builder, plan)
        assert_equal(packed, naive(list(plan.scheduled), world.tables, world.block_size))


def pack(builder: InputBuilder, plan: StepPlan) -> PackedInputs:
    builder.apply(plan)
    return builder.build(plan)


def builder_of(tables: dict[int, list[int]], block_size: int = 4) -> InputBuilder:
    builder = InputBuilder(len(tables), 4 * block_size, block_size)
    for slot, blocks in tables.items():
        builder.block_tables[slot, : len(blocks)] = blocks
    return builder


TABLES = {0: [3, 1, 4, 15], 1: [9, 2, 6, 5], 2: [8, 7, 10, 11]}


def test_decodes_pack_alike_alone_and_beside_a_prompt() -> None:
    """A step of decodes only takes a shorter way; the same rows before a prompt take the general one."""
    decodes = [row(2, 0, 1), row(0, 15, 1, samples=False), row(1, 8, 1)]
    alone = pack(builder_of(TABLES), StepPlan(0, tuple(decodes)))
    mixed = pack(builder_of(TABLES), StepPlan(0, (*decodes, row(1, 9, 2))))
    for name in ("row_slots", "seq_lens", "block_table", "token_slots", "positions", "slot_mapping"):
        assert getattr(mixed, name)[:3].tolist() == getattr(alone, name).tolist(), name
    assert mixed.query_start_loc.tolist() == [*alone.query_start_loc.tolist(), 5]
    assert mixed.logit_tokens.tolist() == [*alone.logit_tokens.tolist(), 4] == [0, 2, 4]
    assert alone.slot_mapping.tolist() == [8 * 4, 15 * 4 + 3, 6 * 4]


@pytest.mark.parametrize("shift", [0, 1, 7])
def test_rows_kept_as_columns_pack_like_single_ones(shift: int) -> None:
    lineup = Lineup(("a", "b", "c"), *(array("q", column) for column in ([2, 0, 1], [5, 6, 7], [0, 8, 3])))
    rows = DecodeRows(lineup, shift)
    wanted = [row(2, shift, 1), row(0, 8 + shift, 1), row(1, 3 + shift, 1)]
    assert [one[1:5] for one in rows] == [one[1:5] for one in wanted] and [one.epoch for one in rows] == [5, 6, 7]
    packed = pack(builder_of(TABLES), StepPlan(0, rows))
    assert_equal(packed, naive(wanted, TABLES, 4))


def test_edits_are_applied_before_rows_are_packed() -> None:
    edits = (BlockTableEdit(1, 1, (20, 21)), BlockTableEdit(1, 2, (22,)), BlockTableEdit(0, 0, (23,)))
    packed = pack(builder_of(TABLES), StepPlan(0, (row(1, 4, 6), row(0, 3, 1)), edits=edits))
    assert packed.block_table.tolist() == [[9, 20, 22], [23, 23, 23]]
    assert packed.slot_mapping.tolist() == [80, 81, 82, 83, 88, 89, 95]


def test_edits_hold_for_later_steps() -> None:
    builder = builder_of(TABLES)
    pack(builder, StepPlan(0, (row(0, 0, 1),), edits=(BlockTableEdit(2, 0, (30,)),)))
    assert pack(builder, StepPlan(1, (row(2, 1, 1),))).slot_mapping.tolist() == [30 * 4 + 1]


def test_a_packed_step_is_not_changed_by_the_next() -> None:
    """It may still be in flight."""
    builder = builder_of(TABLES)
    plan = StepPlan(0, (row(0, 2, 3), row(1, 7, 1)))
    packed = pack(builder, plan)
    edits = tuple(BlockTableEdit(slot, 0, (90, 91, 92, 93)) for slot in TABLES)
    pack(builder, StepPlan(1, (row(0, 5, 1), row(1, 8, 1)), edits=edits))
    assert_equal(packed, naive(list(plan.scheduled), TABLES, 4))


def test_a_step_in_which_nobody_samples() -> None:
    packed = pack(builder_of(TABLES), StepPlan(0, (row(0, 0, 3, samples=False),)))
    assert packed.sampling_rows == () and packed.logit_tokens.shape == (0,)
    assert packed.logit_tokens.dtype == np.int64
