"""Logit bias and token masks: sparse edits of the logits, kept per slot and joined once per batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkit.errors import RequestError
from llmkit.model.sampling.transfer import to_device
from llmkit.types import SamplingParams


@dataclass(frozen=True, slots=True)
class SlotEdits:
    """What one request edits: token ids int64 on the device, `bias` float32 beside `bias_ids`, None where unused.

    `stop_ids` end the request, and are barred while it has fewer than `min_tokens` outputs.
    """

    bias_ids: Tensor | None
    bias: Tensor | None
    barred_ids: Tensor | None
    allowed_ids: Tensor | None
    stop_ids: Tensor | None

    @classmethod
    def of(cls, params: SamplingParams, vocab_size: int, eos: frozenset[int], device: torch.device) -> SlotEdits:
        """Raises RequestError for a biased, allowed or barred token outside the vocabulary."""
        check_token_ids(params, vocab_size)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos)} if params.min_tokens else ()

        def ids(values: Sequence[int] | None) -> Tensor | None:
            return to_device(values, device, torch.int64) if values else None

        bias = params.logit_bias
        return cls(
            ids(list(bias)),
            to_device(list(bias.values()), device, torch.float32) if bias else None,
            ids(sorted(set(params.bad_token_ids))),
            ids(sorted(set(params.allowed_token_ids or ()))),
            ids(sorted(token for token in stops if 0 <= token < vocab_size)),
        )

    @property
    def is_empty(self) -> bool:
        """Whether it edits nothing, `min_tokens` aside."""
        return self.bias_ids is None and self.barred_ids is None and self.allowed_ids is None


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError if `params` biases, allows or bars a token that does not exist."""
    named = (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_token_ids", params.bad_token_ids),
    )
    for field, token_ids in named:
        for token in token_ids:
            if not 0 <= token < vocab_size:
                raise RequestError(f"{field} names token {token}; the vocabulary has ids 0 to {vocab_size - 1}")


@dataclass(frozen=True, slots=True)
class BatchEdits:
    """The edits of all rows of one [R, W] block of logits, as indices into it flattened; int64, None where unused."""

    bias_at: Tensor | None
    bias: Tensor | None
    allowed_rows: Tensor | None
    allowed_at: Tensor | None
    barred_at: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[tuple[int, SlotEdits, bool]], width: int) -> BatchEdits:
        """Join `rows` of (row, its edits, whether its stop tokens are barred) for logits of `width` columns."""
        bias_at = [edits.bias_ids + row * width for row, edits, _ in rows if edits.bias_ids is not None]
        bias = [edits.bias for _, edits, _ in rows if edits.bias is not None]
        allowed = [(row, edits.allowed_ids) for row, edits, _ in rows if edits.allowed_ids is not None]
        barred = [edits.barred_ids + row * width for row, edits, _ in rows if edits.barred_ids is not None]
        barred += [edits.stop_ids + row * width for row, edits, early in rows if early and edits.stop_ids is not None]
        return cls(
            _join(bias_at),
            _join(bias),
            to_device([row for row, _ in allowed], allowed[0][1].device) if allowed else None,
            _join([ids + row * width for row, ids in allowed]),
            _join(barred),
        )

    def apply(self, logits: Tensor) -> None:
        """Edit contiguous `logits` [R, W] in place: bias, then all but the allowed tokens, then the barred ones."""
        flat = logits.view(-1)
        if self.bias_at is not None and self.bias is not None:
            flat.index_add_(0, self.bias_at, self.bias.to(flat.dtype))
        if self.allowed_rows is not None and self.allowed_at is not None:
            kept = flat.index_select(0, self.allowed_at)
            logits.index_fill_(0, self.allowed_rows, -torch.inf)
            flat.index_copy_(0, self.allowed_at, kept)
        if self.barred_at is not None:
            flat.index_fill_(0, self.barred_at, -torch.inf)


def _join(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None
