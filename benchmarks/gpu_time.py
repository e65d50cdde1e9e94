"""Times on a GPU, between CUDA events."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

COPIED, WIDTH = 1 << 31, 8192


def median_ms(run: Callable[[], object], repeats: int = 10, before: Callable[[], object] = lambda: None) -> float:
    """Median time of `run`, after two runs that do not count; `before` each of them runs as well, not timed."""
    times = []
    for _ in range(repeats + 2):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `run`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / median_ms(lambda: target.copy_(source)) * 1e3


def product_flops() -> float:
    """Operations per second of a product of 8192 x 8192 random bfloat16 numbers by as many."""
    left, right = (torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * WIDTH**3 / median_ms(lambda: left @ right) * 1e3
