"""Cost of choosing tokens on a CPU, by what the requests ask for; plain sampling against full-vocabulary noise.

The limit is the project's: two-level sampling is at least three times cheaper than Gumbel-max sampling, here in its
usual form, `argmax(softmax(x) / exponential noise)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from llmkit.model.sampling import Sampled, Sampler
from llmkit.types import SamplingParams

CPU = torch.device("cpu")
SHAPES = [(rows, vocab_size) for vocab_size in (4096, 32000) for rows in (1, 8, 64)]
KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9),
    "top_k": SamplingParams(temperature=0.8, top_k=50),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.1, frequency_penalty=0.2),
    "logprobs": SamplingParams(temperature=0, logprobs=5),
}
MIN_SPEEDUP = 3.0


def logits_of(rows: int, vocab_size: int) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 3


def build_step(rows: int, vocab_size: int, params: SamplingParams) -> Callable[[], Sampled]:
    """One decode step of `rows` requests, each 500 tokens long, 100 of them prompt."""
    sampler = Sampler(vocab_size, rows, CPU, frozenset({0}))
    for slot in range(rows):
        sampler.set_slot(slot, params, slot, 100)
    logits, slots, positions = logits_of(rows, vocab_size), list(range(rows)), [500] * rows
    tokens = torch.randint(0, vocab_size, (rows, 600), generator=torch.Generator().manual_seed(1))
    return lambda: sampler.sample(logits, slots, positions, tokens)


@pytest.mark.parametrize(("rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step(benchmark: BenchmarkFixture, kind: str, rows: int, vocab_size: int) -> None:
    sampled = benchmark.pedantic(build_step(rows, vocab_size, KINDS[kind]), rounds=100, warmup_rounds=5)
    assert len(sampled.tolist()) == rows and sampled.errors == {}


@pytest.mark.parametrize("rows", [8, 64])
def test_a_new_request_every_step(benchmark: BenchmarkFixture, rows: int) -> None:
    """The plan of the batch is made anew: what joining and leaving requests cost."""
    sampler = Sampler(4096, rows, CPU, frozenset({0}))
    mixed = list(KINDS.values())
    for slot in range(rows):
        sampler.set_slot(slot, mixed[slot % len(mixed)], slot, 100)
    logits, slots, positions = logits_of(rows, 4096), list(range(rows)), [500] * rows
    tokens = torch.zeros(rows, 600, dtype=torch.int64)

    def step() -> Sampled:
        sampler.set_slot(0, KINDS["temperature"], 0, 100)
        return sampler.sample(logits, slots, positions, tokens)

    assert benchmark.pedantic(step, rounds=100, warmup_rounds=5).errors == {}


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@pytest.mark.parametrize(("rows", "vocab_size"), [(8, 4096), (64, 32000)])
def test_two_levels_against_noise_over_the_vocabulary(benchmark: BenchmarkFixture, rows: int, vocab_size: int) -> None:
    logits, temperature = logits_of(rows, vocab_size), torch.full((rows, 1), 0.8)
    step = build_step(rows, vocab_size, KINDS["temperature"])

    def exponential() -> Tensor:
        return ((logits / temperature).softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)

    def gumbel() -> Tensor:
        return (logits / temperature - torch.rand_like(logits).log_().neg_().log_()).argmax(-1)

    rounds = 40 if benchmark.enabled else 1
    times = [(seconds(step), seconds(exponential), seconds(gumbel)) for _ in range(rounds)]
    ours, race, logs = (min(column) for column in zip(*times, strict=True))
    benchmark.extra_info |= {"speedup_over_exponential": race / ours, "speedup_over_gumbel": logs / ours}
    benchmark.pedantic(step, rounds=rounds)
    if benchmark.enabled:
        assert race / ours >= MIN_SPEEDUP, f"only {race / ours:.1f} times cheaper than noise over the vocabulary"
