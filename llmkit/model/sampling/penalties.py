"""Repetition, presence and frequency penalties, from the token history on the device.

The repetition penalty (Keskar et al. 2019; as in transformers and vLLM) looks at prompt and output: a positive logit of
a token seen is divided by it, a negative one multiplied. Presence and frequency (OpenAI) look at the output only:
logit -= frequency * count + presence * (count > 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.model.sampling.transfer import to_device
from llmkit.types import SamplingParams


def is_penalised(params: SamplingParams) -> bool:
    """Whether any of the three penalties is on."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class Penalties:
    """The penalised rows of one [R, W] block of logits: all tensors [Q, 1], indices int64, penalties float32.

    `first` is the earliest token that matters to any of them: 0 with a repetition penalty, else the shortest prompt.
    """

    group_rows: tuple[int, ...]
    rows: Tensor
    slots: Tensor
    num_prompt_tokens: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    first: int
    counts_outputs: bool

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, SamplingParams]], device: torch.device) -> Penalties:
        """Gather `rows` of (row, slot, number of prompt tokens, parameters)."""

        def column(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
            return to_device(values, device, dtype)[:, None]

        params = [p for *_, p in rows]
        repeats = any(p.repetition_penalty != 1 for p in params)
        return cls(
            tuple(row for row, *_ in rows),
            column([row for row, *_ in rows], torch.int64),
            column([slot for _, slot, *_ in rows], torch.int64),
            column([prompt for _, _, prompt, _ in rows], torch.int64),
            column([p.repetition_penalty for p in params], torch.float32),
            column([p.presence_penalty for p in params], torch.float32),
            column([p.frequency_penalty for p in params], torch.float32),
            0 if repeats else min(prompt for _, _, prompt, _ in rows),
            any(p.presence_penalty != 0 or p.frequency_penalty != 0 for p in params),
        )

    def apply(self, logits: Tensor, positions: Sequence[int], tokens: Tensor) -> None:
        """Penalise contiguous `logits` [R, W] in place.

        `positions[row]`: tokens known of the row; `tokens` [max_num_seqs, max_len]: history by slot. Work and memory
        grow with the history, not with the vocabulary, but for one integer table where outputs are counted.
        """
        lengths = [positions[row] for row in self.group_rows]
        if max(lengths) <= self.first:
            return
        where = torch.arange(self.first, max(lengths), device=logits.device)
        known = where < to_device(lengths, logits.device)[:, None]
        slots = self.slots[:, 0]
        history = tokens[:, self.first : max(lengths)].index_select(0, slots).long()
        # Beyond its end a row repeats its first token: equal entries are written with equal values.
        history = torch.where(known, history, tokens[:, :1].index_select(0, slots).long())
        flat = logits.view(-1)
        at = history + self.rows * logits.shape[1]
        seen = flat[at]
        seen = torch.where(seen > 0, seen / self.repetition, seen * self.repetition)
        if self.counts_outputs:
            written = (known & (where >= self.num_prompt_tokens)).to(torch.int32)
            counts = torch.zeros(len(lengths), logits.shape[1], dtype=torch.int32, device=logits.device)
            count = counts.scatter_add_(1, history, written).gather(1, history)
            seen = seen - self.frequency * count - self.presence * (count > 0)
        flat[at] = seen.to(flat.dtype)
