"""Large matrix products on a GPU, each by whichever of torch's two libraries was measured to be faster for its rows.

torch gives a product to cuBLAS, but one with a bias to cuBLASLt, which chooses its kernels otherwise: for some dozens
of rows faster ones by up to a sixth, for other numbers slower ones. So a product without a bias may take one of zeros
along; sums may then round otherwise in the last bit. What decides is a measurement, made once a process for a number
of rows and a shape of weights, where a step has run that is about to be captured (`measuring`). Steps that are not
captured do as was decided, and without a bias where nothing was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

MIN_BYTES = 16 << 20
"""Smaller weights are left alone: there is less to gain than a measurement can tell."""
ROWS = range(2, 257)
"""Numbers of rows that are measured: one row never takes a bias to cuBLASLt, and for many both are as fast."""
READ_BYTES = 256 << 20
"""Weights that are read in a run: several times an L2 cache, so that each comes from memory as it does in a step."""
NUM_RUNS = 3
MARGIN = 0.98
"""The bias is taken if it needs less than this part of the time: what is level stays as it is in every process."""
CYCLES = 50_000
"""For a launch, some 25 us: longer than the host takes for it."""

Launch = Callable[[], object]
Seconds = Callable[[Sequence[Launch]], float]
"""How long the device takes for these launches."""


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What products by weights of one shape, dtype and device share: `zeros` [out], and by number of rows whether they
    take it along, as far as that is known."""

    zeros: Tensor
    takes_zeros: dict[int, bool] = field(default_factory=dict)


@cache
def kind_of(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Kind:
    """The same object for the same weights' shape [out, in], dtype and device."""
    return Kind(torch.zeros(shape[0], dtype=dtype, device=device))


@dataclass(frozen=True, slots=True)
class Met:
    """Products of one kind in a step, of as many rows: an input of them [rows, in], and all weights."""

    x: Tensor
    weights: list[Tensor]


_met: ContextVar[dict[tuple[Kind, int], Met] | None] = ContextVar("llmkit_products", default=None)


def has_choice(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a linear layer should be a `Product`."""
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    return weight.device.type == "cuda" and is_half and bias is None and weight.nbytes >= MIN_BYTES


class Product:
    """`x @ weight.T` for `weight` [out, in]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.kind = kind_of(weight.shape, weight.dtype, weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [N, in] -> [N, out]."""
        takes_zeros = self.kind.takes_zeros.get(len(x))
        if takes_zeros is None and len(x) in ROWS and (met := _met.get()) is not None:
            met.setdefault((self.kind, len(x)), Met(x, [])).weights.append(self.weight)
        return F.linear(x, self.weight, self.kind.zeros if takes_zeros else None)


@contextmanager
def measuring(seconds: Seconds | None = None) -> Iterator[None]:
    """Run a step inside: behind it all of its products are decided. Must not be captured; a capture may follow.

    Measured on the current stream, by `seconds` if that is given.
    """
    met: dict[tuple[Kind, int], Met] = {}
    token = _met.set(met)
    try:
        yield
    finally:
        _met.reset(token)
    for (kind, rows), of_kind in met.items():
        kind.takes_zeros[rows] = is_faster_with(kind.zeros, of_kind, seconds or device_seconds)


@torch.inference_mode()
def is_faster_with(zeros: Tensor, met: Met, seconds: Seconds) -> bool:
    """Whether the products need less time with the bias `zeros`. They do not where a step has too few to tell."""
    num = -(-READ_BYTES // met.weights[0].nbytes)
    if len(met.weights) < num:
        return False
    ways = [[partial(F.linear, met.x, weight, bias) for weight in met.weights[:num]] for bias in (None, zeros)]
    times = [[seconds(way) / num for way in ways] for _ in range(NUM_RUNS + 1)][1:]  # the first loads kernels
    without, with_zeros = (float(median(of_way)) for of_way in zip(*times, strict=True))
    log.debug(
        "%d rows by %s: %.1f us, with a bias of zeros %.1f us",
        len(met.x), tuple(met.weights[0].shape), without * 1e6, with_zeros * 1e6,
    )  # fmt: skip
    return with_zeros < MARGIN * without


def device_seconds(launches: Sequence[Launch]) -> float:
    """Time between events around `launches`, which all wait in the queue before the first one starts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(CYCLES * (len(launches) + 1))  # type: ignore[no-untyped-call]
    start.record()
    for launch in launches:
        launch()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
