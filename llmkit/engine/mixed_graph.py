"""Steps with prompts as CUDA graphs, up to a few thousand tokens: the host sends four integers a row.

What runs where is worked out on the device from the rows' slots and positions, so a graph serves any mix of rows whose
tokens fit. Without a graph the host would need longer to launch such a step than the device to run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.engine.captured import Captured, Choose, Decoded
from llmkit.engine.grouped_attention import GroupedBatch
from llmkit.interfaces.attention import AttentionBackend, AttentionBatch
from llmkit.model.network import Network
from llmkit.types import ScheduledRequest

TOKENS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Numbers of tokens that graphs are captured for."""
ROWS = (16, 64, 128, 256, 512, 1024)
"""Numbers of rows that graphs are captured for."""


@dataclass(frozen=True, slots=True)
class Device:
    """What steps read and write on the device: `tokens` int64 [max_num_seqs + 1, max_model_len + 1] and `tables` int32
    [max_num_seqs + 1, width], whose last slot belongs to rows that fill up, and `more_tables` of further groups."""

    network: Network
    backend: AttentionBackend
    choose: Choose
    tokens: Tensor
    tables: Tensor
    pool: Any
    more_tables: Sequence[Tensor] = ()

    @property
    def spare(self) -> int:
        """The slot of rows that fill up."""
        return len(self.tables) - 1

    @property
    def reach(self) -> int:
        """The longest sequence."""
        return self.tokens.shape[1] - 1


class MixedGraphs:
    """One graph per number of tokens and of rows, captured when first needed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._captured: dict[tuple[int, int], Captured] = {}

    def is_supported(self) -> bool:
        """Whether the backend lets steps be captured whose rows have any number of tokens."""
        return self._device.backend.capturable(pack(self._device, self._padding(ROWS[0]), TOKENS[0])[1])

    def smallest(self) -> tuple[Tensor, Tensor]:
        """Run the smallest step that is captured, of nobody's tokens."""
        return step(self._device, self._padding(ROWS[0]), TOKENS[0])

    def takes(self, rows: Sequence[ScheduledRequest]) -> bool:
        """Whether a graph is large enough."""
        return len(rows) <= ROWS[-1] and sum(row.num_tokens for row in rows) <= TOKENS[-1]

    def run(self, rows: Sequence[ScheduledRequest]) -> Decoded:
        """Replay a step that `takes` said yes to; tokens of rows that do not sample are kept from the token table.

        Raises RuntimeError if it cannot be captured.
        """
        num_tokens = sum(row.num_tokens for row in rows)
        kind = next(n for n in ROWS if n >= len(rows)), next(n for n in TOKENS if n >= num_tokens)
        if kind not in self._captured:
            self._captured[kind] = self.capture(*kind)
        return self._captured[kind].replay(columns(rows, kind[0], self._device.spare), len(rows))

    def capture(self, num_rows: int, num_tokens: int) -> Captured:
        """Capture a step of so many rows and tokens."""
        return Captured.of(
            lambda inputs: step(self._device, inputs, num_tokens), self._padding(num_rows), self._device.pool
        )

    def _padding(self, num_rows: int) -> Tensor:
        return torch.from_numpy(columns([], num_rows, self._device.spare)).to(self._device.tokens.device)


def columns(rows: Sequence[ScheduledRequest], num_rows: int, spare: int) -> NDArray[np.int64]:
    """int64 [4, num_rows]: each row's slot, first position, number of tokens, and slot again if it samples; else, and
    in rows that fill up, the spare one."""
    numbers = np.full((4, num_rows), [[spare], [0], [0], [spare]], dtype=np.int64)
    if rows:
        real = [(row.slot, row.start, row.num_tokens, row.slot if row.samples else spare) for row in rows]
        numbers[:, : len(rows)] = np.array(real, dtype=np.int64).T
    return numbers


def step(device: Device, inputs: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Run the rows of `inputs`, as of `columns`, in `num_tokens` tokens, and choose a token for each row."""
    ids, batch = pack(device, inputs, num_tokens)
    device.backend.plan(batch)
    last = (batch.query_start_loc[1:].long() - 1).clamp_(min=0)
    logits = device.network(ids, batch.positions, last)
    return logits, device.choose(logits, inputs[3], batch.seq_lens.long(), device.tokens)


def pack(device: Device, inputs: Tensor, num_tokens: int) -> tuple[Tensor, AttentionBatch]:
    """Input ids int64 [num_tokens] and the batch; tokens behind those of all rows are the spare slot's first."""
    slots, starts, counts, _ = inputs.unbind()
    ends, index = counts.cumsum(0), torch.arange(num_tokens, device=inputs.device)
    row = torch.searchsorted(ends, index, right=True)
    is_real, row = row < len(slots), row.clamp_(max=len(slots) - 1)
    positions = torch.where(is_real, index + (starts - ends + counts)[row], 0)
    slot, block_size = torch.where(is_real, slots[row], device.spare), device.backend.requirements.block_size

    def kv_slots(table: Tensor) -> Tensor:
        places = table[slot, positions // block_size].long() * block_size + positions % block_size
        return torch.where(is_real, places, -1)

    batch = AttentionBatch(
        query_start_loc=torch.nn.functional.pad(ends, (1, 0)).to(torch.int32),
        seq_lens=torch.where(counts > 0, starts + counts, 0).to(torch.int32),
        positions=positions,
        block_table=device.tables[slots],
        slot_mapping=kv_slots(device.tables),
        max_query_len=num_tokens,
        max_seq_len=device.reach,
        query_lens=(num_tokens,) * len(slots),
        host_seq_lens=(device.reach,) * len(slots),
        lens_are_bounds=True,
    )
    if device.more_tables:
        others = [replace(batch, block_table=one[slots], slot_mapping=kv_slots(one)) for one in device.more_tables]
        batch = GroupedBatch.of([batch, *others])
    return device.tokens[slot, positions], batch
