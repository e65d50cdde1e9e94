"""The numbers of a grid: two arms measured side by side in every cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, geometric_mean, median
from typing import Any, NamedTuple

from llmkit.metrics.paired import paired_ratio


class Timing(NamedTuple):
    """One measurement of one arm, seconds: until all requests had ended, and on average until each had."""

    seconds: float
    mean_e2el: float


@dataclass(slots=True)
class Cell:
    """One cell: `batch_size` prompts of `prompt_len` tokens, `max_tokens` out of each; both arms once a round.

    `num_equal_tokens` of `num_compared_tokens` output tokens agree position by position (first round), and
    `num_equal_outputs` of `batch_size` outputs agree entirely.
    """

    prompt_len: int
    batch_size: int
    max_tokens: int
    optimized: list[Timing] = field(default_factory=list)
    naive: list[Timing] = field(default_factory=list)
    num_equal_tokens: int = 0
    num_compared_tokens: int = 0
    num_equal_outputs: int = 0

    @property
    def num_rounds(self) -> int:
        """Rounds in which both arms were measured."""
        return min(len(self.optimized), len(self.naive))

    def tokens_per_second(self, timings: Sequence[Timing]) -> list[float]:
        """Output tokens per second in every round."""
        return [self.batch_size * self.max_tokens / timing.seconds for timing in timings]

    def row(self) -> dict[str, Any]:
        """Medians over the rounds, their range, and the raw timings."""
        optimized = self.tokens_per_second(self.optimized[: self.num_rounds])
        naive = self.tokens_per_second(self.naive[: self.num_rounds])
        ratios = [a / b for a, b in zip(optimized, naive, strict=True)]
        return {
            "prompt_len": self.prompt_len,
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "optimized_tok_s": median(optimized),
            "naive_tok_s": median(naive),
            "speedup": median(optimized) / median(naive),
            "optimized_tok_s_range": [min(optimized), max(optimized)],
            "naive_tok_s_range": [min(naive), max(naive)],
            "speedup_range": [min(ratios), max(ratios)],
            **_latency("optimized", self.optimized),
            **_latency("naive", self.naive),
            "equal_tokens": self.num_equal_tokens / self.num_compared_tokens,
            "optimized_s": [timing.seconds for timing in self.optimized],
            "naive_s": [timing.seconds for timing in self.naive],
        }


def _latency(arm: str, timings: Sequence[Timing]) -> dict[str, Any]:
    latencies = [timing.mean_e2el * 1e3 for timing in timings]
    return {
        f"{arm}_mean_e2el_ms": median(latencies),
        f"{arm}_mean_e2el_ms_range": [min(latencies), max(latencies)],
    }


def compare_tokens(cell: Cell, optimized: Sequence[Sequence[int]], naive: Sequence[Sequence[int]]) -> None:
    """Count where the two arms' outputs agree."""
    for ours, theirs in zip(optimized, naive, strict=True):
        cell.num_equal_tokens += sum(a == b for a, b in zip(ours, theirs, strict=True))
        cell.num_compared_tokens += len(ours)
        cell.num_equal_outputs += list(ours) == list(theirs)


def summarise_grid(cells: Sequence[Cell]) -> dict[str, Any]:
    """Rows of all measured cells, the geometric mean speedup per batch size, and how far the outputs agree."""
    measured = [cell for cell in cells if cell.num_rounds]
    sizes = sorted({cell.batch_size for cell in measured})
    num_compared = sum(cell.num_compared_tokens for cell in measured)
    return {
        "num_rounds": min((cell.num_rounds for cell in cells), default=0),
        "rows": [cell.row() for cell in measured],
        "geometric_means": {str(n): mean_speedup([c for c in measured if c.batch_size == n]) for n in sizes},
        "equal_tokens": sum(cell.num_equal_tokens for cell in measured) / num_compared if num_compared else None,
        "equal_outputs": sum(cell.num_equal_outputs for cell in measured),
        "num_outputs": sum(cell.batch_size for cell in measured),
    }


def mean_speedup(cells: Sequence[Cell]) -> dict[str, Any]:
    """Geometric mean of the speedups of all cells and rounds, and a 95 % interval for the noise of measuring.

    The interval is a paired t interval over the rounds: each round gives one pair, the geometric means of both arms
    over the cells. It says how well these cells were measured on this machine, not how other cells would do.
    """
    rounds = range(min(cell.num_rounds for cell in cells))
    naive, optimized = (
        [geometric_mean([getattr(cell, arm)[index].seconds for cell in cells]) for index in rounds]
        for arm in ("naive", "optimized")
    )
    mean = asdict(paired_ratio(naive, optimized))
    return {"speedup": mean.pop("ratio"), **mean}


def timing(started_at: float, finished_at: Sequence[float]) -> Timing:
    """From the moment of submission and the moment each request had its last token."""
    return Timing(max(finished_at) - started_at, fmean(finished_at) - started_at)
