"""Log-probabilities of the raw model distribution: before bias, masks, penalties, temperature and filters.

That is vLLM's default as well. They are natural logarithms, in float32 or better.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmkit.model.sampling.chunks import chunks
from llmkit.types import TokenLogprobs


class LogprobTensors(NamedTuple):
    """Per row of N: `token_ids` int64, `logprobs` float, `ranks` int64 (1 = most likely, ties share the best) [N];
    the most likely tokens `top_ids` int64 and `top_logprobs` [N, top], best first."""

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def compute_logprobs(logits: Tensor, token_ids: Tensor, top: int) -> LogprobTensors:
    """Log-probabilities of `token_ids` [N] and of the `top` best under `logits` [N, V]; stays on the device."""
    parts = [_compute(logits[part], token_ids[part], top) for part in chunks(logits)]
    return parts[0] if len(parts) == 1 else LogprobTensors(*map(torch.cat, zip(*parts, strict=True)))


def _compute(logits: Tensor, token_ids: Tensor, top: int) -> LogprobTensors:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, token_ids[:, None])
    ranks = (logits > chosen).sum(-1) + 1
    best, best_ids = logits.topk(min(top, logits.shape[-1]), dim=-1)
    return LogprobTensors(token_ids, (chosen - normaliser)[:, 0], ranks, best_ids, best - normaliser)


def to_host(tensors: LogprobTensors, tops: list[int]) -> list[TokenLogprobs]:
    """Rows as plain data, row i with its `tops[i]` best tokens; equally likely ones by id."""
    columns = (tensor.tolist() for tensor in tensors)
    return [
        TokenLogprobs(token, logprob, rank, _best(ids, values)[:top])
        for token, logprob, rank, ids, values, top in zip(*columns, tops, strict=True)
    ]


def _best(ids: list[int], values: list[float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0])))
