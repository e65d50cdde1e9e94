"""Sampling under top-k, top-p and min-p, for the rows that ask.

Definitions and order are those of transformers' `generate`: top-k, then top-p on what top-k left, then min-p
(vLLM applies min-p first, which differs only where top-p and min-p are used together).

- top-k keeps the k largest logits and all equal to the k-th.
- top-p keeps the smallest set of most likely tokens whose probability reaches p; among tokens that are equally likely
  at its edge those with the lowest ids are kept, as greedy decoding would (transformers leaves that to its sort).
- min-p keeps tokens at least `min_p` times as likely as the most likely one.

Each filter keeps an upper end of the row's sorted logits, so together they are one index into them. The draw is made
in sorted order too, by inverse CDF; only then is the drawn value looked up in the row. No indices are sorted and
no row is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmkit.model.sampling.transfer import to_device
from llmkit.types import SamplingParams

NUM_LARGEST = 1024
"""Tokens looked at first on a CPU. Few nuclei are larger; those rows are sorted in full."""
FULL_SORT_BELOW = 8 * NUM_LARGEST
"""Vocabularies smaller than this are sorted in full at once."""


def is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    """Whether any of the three filters can drop a token."""
    return 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0


class Ordered(NamedTuple):
    """The largest logits of each row, `ascending` [F, M], their probabilities `probs` [F, M] and running sums `mass`
    float64 [F, M]; the latter start at the probability of all smaller logits, which is 0 if there are none."""

    ascending: Tensor
    probs: Tensor
    mass: Tensor


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of F rows: `top_k` int64, `top_p` and `min_p` float64, all [F, 1]; off are V, 1 and 0."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    vocab_size: int

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Filters:
        """The filters of rows with these parameters, in this order."""

        def column(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
            return to_device(values, device, dtype)[:, None]

        return cls(
            column([min(p.top_k or vocab_size, vocab_size) for p in params], torch.int64),
            column([p.top_p for p in params], torch.float64),
            column([p.min_p for p in params], torch.float64),
            vocab_size,
        )

    def __getitem__(self, rows: Tensor) -> Filters:
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows], self.vocab_size)

    def start(self, ordered: Ordered) -> tuple[Tensor, Tensor]:
        """Index into `ordered` int64 [F, 1] from which on tokens are kept, and whether that is the whole answer.

        It is not (bool [F, 1] is False) if tokens that `ordered` leaves out may be kept too.
        """
        ascending, probs, mass = ordered
        width = ascending.shape[-1]
        kth = ascending.gather(-1, (width - self.top_k).clamp_(min=0))
        first = torch.searchsorted(ascending, kth)
        below = mass_below(mass, first)
        start = torch.searchsorted(mass, below + (1 - self.top_p) * (mass[:, -1:] - below), right=True)
        likely_enough = torch.searchsorted(probs, (self.min_p * probs[:, -1:]).to(probs.dtype))
        start = torch.maximum(start, likely_enough).clamp_(max=width - 1)
        is_whole = (ascending.gather(-1, start) > ascending[:, :1]) & ((first > 0) | (self.top_k == self.vocab_size))
        return start, is_whole


def mass_below(mass: Tensor, index: Tensor) -> Tensor:
    """Probability of everything before `index` int64 [F, 1], given the running sums `mass` [F, M]."""
    return torch.where(index > 0, mass.gather(-1, (index - 1).clamp_(min=0)), 0.0)


def draw_filtered(scaled: Tensor, filters: Filters, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Sample each row of softmax(`scaled`) [F, W] under `filters`; `uniforms` float64 [F, 1].

    Returns int64 [F], and float64 [F], NaN for rows without a distribution.
    """
    if scaled.device.type != "cpu" or scaled.shape[-1] < FULL_SORT_BELOW:
        ordered = order_all(scaled)
        return _draw(scaled, ordered, filters.start(ordered)[0], uniforms)
    ordered = order_largest(scaled)
    start, is_whole = filters.start(ordered)
    token_ids, total = _draw(scaled, ordered, start, uniforms)
    others = is_whole.logical_not()[:, 0].nonzero()[:, 0]
    if len(others):
        rows = scaled[others]
        ordered = order_all(rows)
        start, _ = filters[others].start(ordered)
        token_ids[others], total[others] = _draw(rows, ordered, start, uniforms[others])
    return token_ids, total


def _draw(scaled: Tensor, ordered: Ordered, start: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    ascending, _, mass = ordered
    total, below = mass[:, -1:], mass_below(mass, start)
    rank = torch.searchsorted(mass, below + uniforms * (total - below), right=True)
    # Rounding may carry the target up to the total (and NaN finds nothing): the most likely token is always kept.
    rank.clamp_(max=mass.shape[-1] - 1)
    value = ascending.gather(-1, rank)
    nth = torch.searchsorted(ascending, value, right=True) - 1 - rank
    return _nth_equal(scaled, value, nth), total[:, 0]


def order_all(scaled: Tensor) -> Ordered:
    """All of `scaled` [F, W] in order."""
    if scaled.device.type == "cpu":
        # numpy sorts bare numbers with vector instructions: 20 to 100 times faster than torch on a CPU.
        ascending = torch.from_numpy(np.sort(scaled.numpy(), axis=-1))
    else:
        ascending = scaled.sort(dim=-1).values
    probs = torch.softmax(ascending, dim=-1)
    return Ordered(ascending, probs, probs.cumsum(-1, dtype=torch.float64))


def order_largest(scaled: Tensor) -> Ordered:
    """The `NUM_LARGEST` largest of `scaled` [F, W] on a CPU in order, several times faster than all of them."""
    largest = np.partition(scaled.numpy(), -NUM_LARGEST, axis=-1)[:, -NUM_LARGEST:]
    ascending = torch.from_numpy(np.sort(largest, axis=-1))
    highest = torch.softmax(scaled, dim=-1).amax(-1, keepdim=True)
    probs = (ascending - ascending[:, -1:]).exp_().mul_(highest)
    mass = probs.cumsum(-1, dtype=torch.float64)
    return Ordered(ascending, probs, mass + (1 - mass[:, -1:]).clamp_(min=0))


def _nth_equal(rows: Tensor, value: Tensor, nth: Tensor) -> Tensor:
    """Column of the `nth` (from 0) entry of each row [F, W] that equals its `value` [F, 1]; int64 [F].

    Some column of the row where there is none, as in rows of NaN.
    """
    if rows.device.type != "cpu":
        count = (rows == value).cumsum(-1, dtype=torch.int64)
        return torch.searchsorted(count, nth + 1)[:, 0].clamp_(max=rows.shape[-1] - 1)
    columns = []
    for row, wanted, n in zip(rows.numpy(), value[:, 0].numpy(), nth[:, 0].tolist(), strict=True):
        equal = np.flatnonzero(row == wanted)
        columns.append(int(equal[n]) if n < len(equal) else 0)
    return torch.tensor(columns, dtype=torch.int64)
