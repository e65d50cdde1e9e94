"""A step captured in a CUDA graph: numbers by row go in, logits and chosen tokens come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.model.products import measuring

Step = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows' numbers int64 [k, n] -> logits [n, vocab] and results int64 [2, n], as of `DeviceSampler.choose`."""
Choose = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`DeviceSampler.choose`: logits, slots, positions and the token table -> results [2, R]."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A replayed step, valid until the next one: `logits` [R, vocab], and the plain choice from them, `results` int64
    [2, >= R] as of `DeviceSampler.choose`."""

    logits: Tensor
    results: Tensor


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph and what it reads and writes: `inputs` int64 [k, n], `logits` [n, vocab], `results` int64 [2, n].

    The graphs of a pool take turns in its memory, so logits last until the next replay of any of them.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor
    results: Tensor

    @classmethod
    def of(cls, step: Step, inputs: Tensor, pool: Any) -> Captured:
        """Capture `step`, whose memory comes from `pool`, over `inputs`, with which it runs once."""
        stream = _side_stream(inputs.device)
        stream.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(stream), measuring():
            step(inputs)  # compiles kernels and creates handles, which a capture must not do
        torch.cuda.current_stream(inputs.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits, results = step(inputs)
        return cls(graph, inputs, borrowed(logits), results)

    def replay(self, inputs: NDArray[np.int64], num_rows: int) -> Decoded:
        """Run the step on other numbers, of which the first `num_rows` rows are real."""
        self.inputs.copy_(torch.from_numpy(inputs).pin_memory(), non_blocking=True)
        self.graph.replay()
        return Decoded(self.logits[:num_rows], self.results)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps run before they are captured: one for all, as cuBLAS keeps memory for every stream it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Memory:
    """Device memory that somebody else owns, for whoever understands CUDA's array interface."""

    __cuda_array_interface__: dict[str, Any]


def borrowed(tensor: Tensor) -> Tensor:
    """The same numbers in the same place, which no longer keeps that place from later captures in the pool."""
    if not tensor.is_contiguous():
        return tensor
    place = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3}
    return torch.as_tensor(_Memory(place), device=tensor.device).view(tensor.dtype).view(tensor.shape)
