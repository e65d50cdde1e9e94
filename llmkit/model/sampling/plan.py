"""Which rows of a batch need what: decided once on the host, kept while the same requests run in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.model.sampling.chunks import rows_at_once
from llmkit.model.sampling.edits import BatchEdits, SlotEdits
from llmkit.model.sampling.nucleus import Filters, is_filtered
from llmkit.model.sampling.penalties import Penalties, is_penalised
from llmkit.model.sampling.processors import Processors
from llmkit.model.sampling.transfer import to_device
from llmkit.types import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM: dividing by them would overflow."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One running request: its parameters, noise key, number of prompt tokens and edits of the logits."""

    params: SamplingParams
    key: int
    num_prompt_tokens: int
    edits: SlotEdits

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    def is_early(self, position: int) -> bool:
        """Whether the token at `position` may not end the request yet."""
        return position - self.num_prompt_tokens < self.params.min_tokens


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of the batch treated alike: `rows` on the host, `index` the same as a slice or int64 on the device.

    `edits`, `penalties` and `processors` are None where no row asks for them; `is_plain` logits need no copy.
    """

    rows: Sequence[int]
    index: slice | Tensor
    edits: BatchEdits | None
    penalties: Penalties | None
    processors: Processors | None

    @property
    def is_plain(self) -> bool:
        return self.edits is None and self.penalties is None and self.processors is None


@dataclass(frozen=True, slots=True)
class Draws:
    """Sampled rows: what they need besides. `temperature` float32 [G, 1]; no row or every row is filtered."""

    group: Group
    keys: NDArray[np.uint64]
    temperature: Tensor
    filters: Filters | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How to sample one batch. `logprob_rows` asked for log-probabilities, with `tops[i]` alternatives each."""

    greedy: Sequence[Group]
    draws: Sequence[Draws]
    logprob_rows: Sequence[int]
    logprob_index: slice | Tensor
    tops: Sequence[int]


class Planner:
    """Builds plans for logits of `vocab_size` columns; edits are laid out for copies of `width` columns."""

    def __init__(self, vocab_size: int, width: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._width = width
        self._device = device
        self._max_rows = rows_at_once(width, device)

    def build(self, slots: Sequence[int], states: Sequence[Slot], early: Sequence[bool]) -> Plan:
        """Plan rows that hold `states` in `slots`; `early[row]`: the row may not stop yet."""
        kinds: dict[str, list[int]] = {"greedy": [], "edited greedy": [], "drawn": [], "filtered": []}
        for row, state in enumerate(states):
            if state.is_greedy:
                params = state.params
                is_changed = is_penalised(params) or bool(params.logits_processors)
                is_edited = early[row] or not state.edits.is_empty or is_changed
                kinds["edited greedy" if is_edited else "greedy"].append(row)
            else:
                kinds["filtered" if is_filtered(state.params, self._vocab_size) else "drawn"].append(row)
        # Greedy rows that stay as they are need no room, so they may all be looked at together.
        greedy = [kinds["greedy"]] if kinds["greedy"] else []
        asked = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        return Plan(
            [self._group(rows, slots, states, early) for rows in greedy + self._split(kinds["edited greedy"])],
            [
                self._draws(rows, slots, states, early)
                for rows in self._split(kinds["drawn"]) + self._split(kinds["filtered"], 2)
            ],
            asked,
            self._index(asked),
            [states[row].params.logprobs or 0 for row in asked],
        )

    def _split(self, rows: list[int], weight: int = 1) -> list[list[int]]:
        """`rows` in pieces of a size that is worked on best; filtered rows weigh 2 for their float64 sums."""
        step = max(1, self._max_rows // weight)
        return [rows[start : start + step] for start in range(0, len(rows), step)]

    def _index(self, rows: list[int]) -> slice | Tensor:
        """`rows`, ascending, as a slice if they are consecutive, which spares a copy."""
        if not rows or rows[-1] - rows[0] == len(rows) - 1:
            return slice(rows[0], rows[-1] + 1) if rows else slice(0)
        return to_device(rows, self._device, torch.int64)

    def _group(self, rows: list[int], slots: Sequence[int], states: Sequence[Slot], early: Sequence[bool]) -> Group:
        edited = [
            (local, states[row].edits, early[row])
            for local, row in enumerate(rows)
            if early[row] or not states[row].edits.is_empty
        ]
        penalised = [
            (local, slots[row], states[row].num_prompt_tokens, states[row].params)
            for local, row in enumerate(rows)
            if is_penalised(states[row].params)
        ]
        processed = [
            (local, row, slots[row], states[row].params.logits_processors)
            for local, row in enumerate(rows)
            if states[row].params.logits_processors
        ]
        return Group(
            rows,
            self._index(rows),
            BatchEdits.of(edited, self._width) if edited else None,
            Penalties.of(penalised, self._device) if penalised else None,
            Processors(processed) if processed else None,
        )

    def _draws(self, rows: list[int], slots: Sequence[int], states: Sequence[Slot], early: Sequence[bool]) -> Draws:
        params = [states[row].params for row in rows]
        return Draws(
            self._group(rows, slots, states, early),
            np.array([states[row].key for row in rows], dtype=np.uint64),
            to_device([[p.temperature] for p in params], self._device, torch.float32),
            Filters.of(params, self._vocab_size, self._device) if is_filtered(params[0], self._vocab_size) else None,
        )
