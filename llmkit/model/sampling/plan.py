"""Which rows of a batch need what: decided once on the host, kept while the same requests run in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.model.sampling.edits import BatchEdits, SlotEdits
from llmkit.model.sampling.nucleus import Filters, is_filtered
from llmkit.model.sampling.penalties import Penalties, is_penalised
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
    """Rows of the batch treated alike: `rows` on the host, `index` int64 on the device (None: all of them).

    `edits` and `penalties` are None where no row asks for them, so `is_plain` logits need no copy.
    """

    rows: tuple[int, ...]
    index: Tensor | None
    edits: BatchEdits | None
    penalties: Penalties | None

    @property
    def is_plain(self) -> bool:
        return self.edits is None and self.penalties is None


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

    greedy: Group | None
    draws: tuple[Draws, ...]
    logprob_rows: tuple[int, ...]
    logprob_index: Tensor | None
    tops: list[int]


class Planner:
    """Builds plans for logits of `vocab_size` columns; edits are laid out for copies of `width` columns."""

    def __init__(self, vocab_size: int, width: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._width = width
        self._device = device

    def build(self, slots: Sequence[int], states: Sequence[Slot], early: Sequence[bool]) -> Plan:
        """Plan rows that hold `states` in `slots`; `early[row]`: the row may not stop yet."""
        greedy = [row for row, state in enumerate(states) if state.is_greedy]
        drawn = [row for row, state in enumerate(states) if not state.is_greedy]
        filtered = [row for row in drawn if is_filtered(states[row].params, self._vocab_size)]
        plain = [row for row in drawn if row not in filtered] if filtered else drawn
        asked = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        return Plan(
            self._group(greedy, slots, states, early) if greedy else None,
            tuple(self._draws(rows, slots, states, early) for rows in (plain, filtered) if rows),
            tuple(asked),
            torch.tensor(asked, dtype=torch.int64, device=self._device) if asked else None,
            [states[row].params.logprobs or 0 for row in asked],
        )

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
        return Group(
            tuple(rows),
            None if len(rows) == len(states) else torch.tensor(rows, dtype=torch.int64, device=self._device),
            BatchEdits.of(edited, self._width) if edited else None,
            Penalties.of(penalised, self._device) if penalised else None,
        )

    def _draws(self, rows: list[int], slots: Sequence[int], states: Sequence[Slot], early: Sequence[bool]) -> Draws:
        params = [states[row].params for row in rows]
        return Draws(
            self._group(rows, slots, states, early),
            np.array([states[row].key for row in rows], dtype=np.uint64),
            torch.tensor([[p.temperature] for p in params], dtype=torch.float32, device=self._device),
            Filters.of(params, self._vocab_size, self._device) if is_filtered(params[0], self._vocab_size) else None,
        )
