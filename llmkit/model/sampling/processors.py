"""Functions of a request over its own logits: whatever they do stays in their row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.sampling_params import LogitsProcessor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Processors:
    """The rows of one [R, W] block of logits that have functions: (row of the block, row of the batch, slot, them)."""

    rows: Sequence[tuple[int, int, int, Sequence[LogitsProcessor]]]

    def apply(self, logits: Tensor, vocab_size: int, positions: Sequence[int], tokens: Tensor) -> dict[int, str]:
        """Let them change `logits` in place; what went wrong, one line each, by row of the batch.

        `positions` [R], `tokens`: as in `Penalties.apply`. A row whose function fails becomes NaN: nothing can be
        chosen there.
        """
        errors: dict[int, str] = {}
        for local, row, slot, functions in self.rows:
            mine = logits[local, :vocab_size]
            for function in functions:
                try:
                    mine.copy_(_checked(function(tokens[slot, : positions[local]], mine), vocab_size))
                except Exception as fault:
                    log.warning("a logits processor failed", exc_info=fault)
                    name = getattr(function, "__name__", type(function).__name__)
                    errors[row] = f"logits processor {name!r} failed: {type(fault).__name__}: {_line(fault)}"
                    mine.fill_(torch.nan)
                    break
        return errors


def _checked(logits: object, vocab_size: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.shape != (vocab_size,) or not logits.is_floating_point():
        shape = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"it gave {shape} instead of [{vocab_size}] logits")
    return logits


def _line(fault: Exception) -> str:
    return str(fault).strip().partition("\n")[0][:200]
