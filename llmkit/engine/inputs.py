"""From a step's plan to packed arrays: who runs, where they read and write. Host side, numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmkit.types import DecodeRows, ScheduledRequest, StepPlan

Ints = NDArray[np.int64]


@dataclass(slots=True)
class PackedInputs:
    """Arrays of one step: R rows, N packed tokens, S sampling rows. Nobody changes it.

    `token_slots` and `positions` int64 [N] say where each input token stands in the token table; `slot_mapping`
    int64 [N] where its KV goes; `logit_tokens` [S] which packed tokens choose a next one; `fresh_blocks` [F] are the
    blocks whose first slot is written.
    """

    row_slots: Ints
    query_start_loc: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    block_table: NDArray[np.int32]
    token_slots: Ints
    positions: Ints
    slot_mapping: Ints
    logit_tokens: Ints
    fresh_blocks: Ints
    sampling_rows: tuple[int, ...]
    query_lens: tuple[int, ...]


def slots_and_starts(rows: Sequence[ScheduledRequest]) -> tuple[Ints, Ints]:
    """Slot and first position of every row, int64 [R]; `DecodeRows` hold them as they are."""
    if isinstance(rows, DecodeRows):
        slots, starts = (np.frombuffer(column, np.int64) for column in (rows.lineup.slots, rows.lineup.starts))
        return slots, starts + rows.shift
    return np.array([row.slot for row in rows], np.int64), np.array([row.start for row in rows], np.int64)


class InputBuilder:
    """Keeps the block tables of all slots and packs plans; work is proportional to the step's tokens."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, window: int | None = None) -> None:
        self.block_size = block_size
        self.window = window
        self.block_tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)

    def apply(self, plan: StepPlan) -> None:
        """Apply the plan's block-table edits."""
        for slot, start, blocks in plan.edits:
            self.block_tables[slot, start : start + len(blocks)] = blocks

    def build(self, plan: StepPlan) -> PackedInputs:
        """Pack the plan's rows; its edits have been applied."""
        rows = plan.scheduled
        is_decode = type(rows) is DecodeRows
        query_lens = (1,) * len(rows) if is_decode else tuple([row.num_tokens for row in rows])
        slots, starts = slots_and_starts(rows)
        lens = np.array(query_lens, dtype=np.int64)
        ends = lens.cumsum()
        query_start_loc = np.zeros(len(rows) + 1, np.int32)
        query_start_loc[1:] = ends
        if ends[-1] == len(rows):
            positions, token_slots = starts, slots
        else:
            positions = np.arange(ends[-1]) + np.repeat(starts - ends + lens, lens)
            token_slots = np.repeat(slots, lens)
        token_blocks = self.block_tables[token_slots, positions // self.block_size].astype(np.int64)
        offsets = positions % self.block_size
        seq_lens = (starts + lens).astype(np.int32)
        sampling = range(len(rows)) if is_decode else [index for index, row in enumerate(rows) if row.samples]
        return PackedInputs(
            row_slots=slots,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_table=self._tables(slots, starts, seq_lens),
            token_slots=token_slots,
            positions=positions,
            slot_mapping=token_blocks * self.block_size + offsets,
            logit_tokens=ends[list(sampling)] - 1,
            fresh_blocks=token_blocks[offsets == 0],
            sampling_rows=tuple(sampling),
            query_lens=query_lens,
        )

    def _tables(self, slots: Ints, starts: Ints, seq_lens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Block tables of `slots`, as wide as the longest. Shorter ones go on with the first block that they see, and
        begin with it where no query sees anything, so that nobody reads what belongs to others, not even to mask it: a
        masked NaN is still a NaN."""
        num_blocks = -(-seq_lens // self.block_size)
        tables = self.block_tables[slots, : num_blocks.max()]
        columns = np.arange(tables.shape[1])
        if self.window is None:
            return np.where(columns < num_blocks[:, None], tables, tables[:, :1])
        first = np.maximum(starts - self.window + 1, 0)[:, None] // self.block_size
        own = (columns >= first) & (columns < num_blocks[:, None])
        return np.where(own, tables, tables[np.arange(len(slots))[:, None], first])
