"""Decode steps as CUDA graphs: inputs by row, network, sampler and the write of the new tokens, in one replay."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.engine.captured import Captured, Choose, Decoded
from llmkit.engine.grouped_attention import GroupedBatch
from llmkit.engine.inputs import slots_and_starts
from llmkit.engine.mixed_graph import Device, MixedGraphs
from llmkit.engine.repeats import num_repeated_keys
from llmkit.interfaces.attention import AttentionBackend, AttentionBatch
from llmkit.model.network import Network
from llmkit.model.rehearsal import rehearse
from llmkit.model.sampling.transfer import to_device
from llmkit.rows import Lineup
from llmkit.types import DecodeRows, Edits, ScheduledRequest, StepPlan

log = logging.getLogger(__name__)

MAX_ROWS = 1024
SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def buckets_up_to(max_rows: int) -> list[int]:
    """Row counts that graphs are captured for, ascending; the last takes `max_rows`, or MAX_ROWS if that is less."""
    max_rows = min(max_rows, MAX_ROWS)
    sizes = [*SMALL_BUCKETS, *range(SMALL_BUCKETS[-1] + 64, MAX_ROWS + 1, 64)]
    return [size for size in sizes if size < max_rows] + [max_rows]


def is_decode(rows: Sequence[ScheduledRequest]) -> bool:
    """Whether every row computes and samples one token."""
    return isinstance(rows, DecodeRows) or all(row.num_tokens == 1 and row.samples for row in rows)


class DecodeGraphs:
    """Keeps every slot's block table on the device and one graph per bucket of rows, captured when first needed.

    Steps in which the backend reads once what rows repeat have graphs of their own.

    Rows that only fill a bucket up have sequence length 0 and belong to the token table's spare last slot.
    """

    def __init__(
        self,
        network: Network,
        backend: AttentionBackend,
        choose: Choose,
        tokens: Tensor,
        block_tables: NDArray[np.int32],
        more_block_tables: Sequence[NDArray[np.int32]] = (),
    ) -> None:
        """`tokens` int64 [max_num_seqs + 1, max_model_len + 1]; `block_tables` the host's, [max_num_seqs, width], and
        those of further groups of layers."""
        self._network = network
        self._choose = choose
        self._backend = backend
        self._tokens = tokens
        self._spare = len(block_tables)
        self._host_tables = block_tables
        self._more_host_tables = more_block_tables
        self._block_size = backend.requirements.block_size
        self._tables = torch.zeros(self._spare + 1, block_tables.shape[1], dtype=torch.int32, device=tokens.device)
        self._more_tables = [torch.zeros_like(self._tables) for _ in more_block_tables]
        self._buckets = buckets_up_to(self._spare)
        self._captured: dict[tuple[int, bool], Captured] = {}
        self._counts = backend.reads_once(tokens.numel())
        self._counted: tuple[Lineup | None, int] = (None, 0)
        self._pool = torch.cuda.graph_pool_handle()

    @cached_property
    def mixed(self) -> MixedGraphs | None:
        """Graphs of steps with prompts, if the backend lets them be captured."""
        parts = self._network, self._backend, self._choose, self._tokens, self._tables, self._pool
        mixed = MixedGraphs(Device(*parts, self._more_tables))
        return mixed if mixed.is_supported() else None

    def apply(self, plan: StepPlan) -> None:
        """Bring the plan's block-table edits to the device; work is proportional to the blocks that are new."""
        if not plan.edits:
            return
        _write(self._tables, plan.edits)
        for table, edits in zip(self._more_tables, plan.more_edits, strict=True):
            _write(table, edits)

    def takes(self, plan: StepPlan) -> bool:
        """Whether a graph is large enough for `plan`."""
        rows = plan.scheduled
        if is_decode(rows):
            return len(rows) <= self._buckets[-1]
        return self.mixed is not None and self.mixed.takes(rows)

    def run(self, plan: StepPlan) -> Decoded:
        """Replay a step that `takes` said yes to. Raises RuntimeError if it cannot be captured."""
        if not is_decode(plan.scheduled):
            assert self.mixed is not None
            return self.mixed.run(plan.scheduled)
        num_rows = len(plan.scheduled)
        size = next(size for size in self._buckets if size >= num_rows)
        repeated = self._num_repeated(plan) if self._counts else 0
        kind = size, self._backend.reads_once(repeated)
        if kind not in self._captured:
            self._captured[kind] = self._capture(size, repeated)
        return self._captured[kind].replay(self._inputs(plan, size), num_rows)

    def capture(self) -> None:
        """Capture the largest bucket, so that the others fit into its memory, and the smallest.

        The rest follow when they are first needed.
        """
        started = time.perf_counter()
        rehearse(self._tokens.device, *self.first_steps())
        for size in self._first_sizes():
            self._captured[size, False] = self._capture(size, 0)
        log.info("captured %d decode graphs in %.1f s", len(self._captured), time.perf_counter() - started)

    def first_steps(self) -> list[Callable[[], object]]:
        """The steps that `capture` captures, and the smallest with prompts, so that none waits for its kernels."""
        decodes = [partial(self._step, self._padding(size), 0) for size in self._first_sizes()]
        return [*decodes, self.mixed.smallest] if self.mixed is not None else [*decodes]

    def _first_sizes(self) -> list[int]:
        return list(dict.fromkeys((self._buckets[-1], self._buckets[0])))

    def is_supported(self) -> bool:
        """Whether the backend lets decode steps be captured."""
        return self._backend.capturable(self._batch(self._padding(1)))

    def _num_repeated(self, plan: StepPlan) -> int:
        """Counted once for the steps of one lineup, whose new blocks are all their own."""
        rows = plan.scheduled
        lineup = rows.lineup if isinstance(rows, DecodeRows) else None
        if lineup is None or lineup is not self._counted[0]:
            slots, positions = slots_and_starts(rows)
            self._counted = lineup, num_repeated_keys(self._host_tables, slots, positions, self._block_size)
        return self._counted[1]

    def _padding(self, size: int) -> Tensor:
        row = [self._spare, 0, -1, 0] + [-1] * len(self._more_tables)
        return torch.tensor(row, dtype=torch.int64, device=self._tokens.device)[:, None].repeat(1, size)

    def _inputs(self, plan: StepPlan, size: int) -> NDArray[np.int64]:
        """int64 [4, size]: each row's slot, position, KV slot and sequence length. Further groups' KV slots follow."""
        slots, positions = slots_and_starts(plan.scheduled)
        columns, offsets = np.divmod(positions, self._block_size)
        kv_slots = self._host_tables[slots, columns].astype(np.int64) * self._block_size + offsets
        inputs = np.empty((4 + len(self._more_host_tables), size), dtype=np.int64)
        inputs[:4, : len(slots)] = slots, positions, kv_slots, positions + 1
        inputs[:4, len(slots) :] = [[self._spare], [0], [-1], [0]]
        for row, tables in enumerate(self._more_host_tables, 4):
            inputs[row, : len(slots)] = tables[slots, columns].astype(np.int64) * self._block_size + offsets
            inputs[row, len(slots) :] = -1
        return inputs

    def _capture(self, size: int, repeated: int) -> Captured:
        return Captured.of(lambda inputs: self._step(inputs, repeated), self._padding(size), self._pool)

    def _step(self, inputs: Tensor, repeated: int) -> tuple[Tensor, Tensor]:
        slots, positions, _, seq_lens = inputs[:4].unbind()
        batch = self._batch(inputs, repeated)
        self._backend.plan(batch)
        logits = self._network(self._tokens[slots, positions], positions, batch.query_start_loc[:-1].long())
        return logits, self._choose(logits, slots, seq_lens, self._tokens)

    def _batch(self, inputs: Tensor, repeated: int = 0) -> AttentionBatch:
        slots, positions, slot_mapping, seq_lens = inputs[:4].unbind()
        size, reach = len(slots), self._tokens.shape[1] - 1
        batch = AttentionBatch(
            query_start_loc=torch.arange(size + 1, dtype=torch.int32, device=inputs.device),
            seq_lens=seq_lens.to(torch.int32),
            positions=positions,
            block_table=self._tables[slots],
            slot_mapping=slot_mapping,
            max_query_len=1,
            max_seq_len=reach,
            query_lens=(1,) * size,
            host_seq_lens=(reach,) * size,
            num_repeated_keys=repeated,
        )
        if not self._more_tables:
            return batch
        more = zip(self._more_tables, inputs[4:].unbind(), strict=True)
        others = [replace(batch, block_table=table[slots], slot_mapping=places) for table, places in more]
        return GroupedBatch.of([batch, *others])


def _write(table: Tensor, edits: Edits) -> None:
    """Bring `edits` to a table on the device, int32 [slots, width]."""
    entries = [(slot, start + i, block) for slot, start, blocks in edits for i, block in enumerate(blocks)]
    if entries:
        slots, columns, blocks = to_device(torch.tensor(entries, dtype=torch.int64).T.contiguous(), table.device)
        table[slots, columns] = blocks.to(torch.int32)
