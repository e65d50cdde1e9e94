"""Plain sampling draws from softmax(logits / temperature), and greedy takes the first maximum."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.model.sampling import Sampler
from llmkit.model.sampling.draw import block_size_for, draw, most_likely
from llmkit.types import SamplingParams
from tests.model.chisquare import deviation

CPU = torch.device("cpu")
ROWS = 256


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny steps: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def histogram(row: Tensor, params: SamplingParams, steps: int) -> NDArray[np.int64]:
    """How often each token of `row` [V] is drawn by ROWS requests with their own seeds at `steps` positions each."""
    sampler = Sampler(len(row), ROWS, CPU, frozenset())
    for slot in range(ROWS):
        sampler.set_slot(slot, params, slot, 1)
    logits, tokens = row.expand(ROWS, -1), torch.zeros(ROWS, 1, dtype=torch.int64)
    slots = list(range(ROWS))
    drawn = [sampler.sample(logits, slots, [step] * ROWS, tokens).token_ids for step in range(1, steps + 1)]
    return np.bincount(torch.cat(drawn).numpy(), minlength=len(row))


def expected(row: Tensor, temperature: float) -> NDArray[np.float64]:
    return (row.double() / temperature).softmax(-1).numpy()


def bell(vocab_size: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def mostly_barred() -> Tensor:
    row = bell(700)
    row[torch.arange(700) % 10 != 3] = -torch.inf
    return row


CASES = {
    "one block": (bell(5), 1.0),
    "uneven blocks": (bell(997), 0.7),
    "even blocks": (bell(1024), 1.3),
    "flat": (torch.zeros(333), 1.0),
    "peaked": (bell(500, 8.0), 1.0),
    "hot": (bell(500, 8.0), 100.0),
    "cold": (bell(500, 1e-3), 1e-3),
    "mostly barred": (mostly_barred(), 1.0),
    "far from zero": (bell(300) + 1e4, 1.0),
    "far below zero": (bell(300) - 3e4, 0.5),
    "bfloat16": (bell(600).bfloat16(), 0.8),
    "float16": (bell(600).half(), 0.8),
    "float64": (bell(600).double(), 0.8),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_softmax(name: str) -> None:
    row, temperature = CASES[name]
    counts = histogram(row, SamplingParams(temperature=temperature), 150)
    probs = expected(row, temperature)
    assert abs(deviation(counts, probs)) < 4
    total_variation = 0.5 * np.abs(counts / counts.sum() - probs).sum()
    assert total_variation < 0.7 * np.sqrt(probs / counts.sum()).sum()


def test_the_score_would_notice_a_slight_bias() -> None:
    row = bell(997)
    counts = histogram(row, SamplingParams(temperature=0.7), 150)
    assert deviation(counts, expected(row, 0.73)) > 6


@pytest.mark.parametrize(("vocab_size", "block_size"), [(37, 8), (64, 8), (8, 8), (9, 16)])
def test_uniforms_are_inverted_exactly(vocab_size: int, block_size: int) -> None:
    """Over a grid of both uniforms the share of each token is its probability to within the grid's step."""
    row = bell(vocab_size)
    row[2], row[vocab_size - 1] = -torch.inf, -torch.inf
    width = -(-vocab_size // block_size) * block_size
    grid = 300
    steps = torch.arange(grid, dtype=torch.float64) / grid
    noise = torch.cartesian_prod(steps, steps).T[:, :, None]
    scaled = torch.nn.functional.pad(row, (0, width - vocab_size), value=-torch.inf).repeat(grid * grid, 1)
    token_ids, _ = draw(scaled, noise, block_size, vocab_size)
    share = torch.bincount(token_ids, minlength=vocab_size).double() / grid**2
    assert (share - row.double().softmax(-1)).abs().max() < 2 / grid
    assert share[2] == 0 and share[vocab_size - 1] == 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-48])
def test_extreme_uniforms_hit_tokens_that_can_be_drawn(uniform: float) -> None:
    """Barred tokens at both ends of blocks, whole barred blocks at both ends of the row."""
    row = torch.full((64,), -torch.inf)
    row[[19, 21, 35, 44]] = torch.tensor([0.0, -3.0, 1.0, -8.0])
    token_ids, evidence = draw(row[None], torch.full((2, 1, 1), uniform, dtype=torch.float64), 8, 64)
    assert token_ids.tolist() == [19 if uniform == 0 else 44]
    assert evidence.isfinite().all()


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 17, 4096, 32000, 50257, 151936])
def test_blocks_are_about_the_root_of_the_vocabulary(vocab_size: int) -> None:
    assert vocab_size**0.5 / 2 <= block_size_for(vocab_size) <= 4 * vocab_size**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_maximum(dtype: torch.dtype) -> None:
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[:, [7, 4000]] = 50.0
    logits[3, 2] = 50.0
    ids, best = most_likely(logits)
    assert ids.tolist() == [2 if row == 3 else 7 for row in range(40)]
    assert (best == 50).all()


@pytest.mark.parametrize("temperature", [1e-9, 1e-3])
def test_tiny_temperatures_become_greedy(temperature: float) -> None:
    """At 1e-3 a lead of 0.1 is worth e**100."""
    row = bell(400)
    best = int(row.argmax())
    row[best] += 0.1
    assert histogram(row, SamplingParams(temperature=temperature), 5)[best] == 5 * ROWS


def test_large_logits_do_not_overflow() -> None:
    row = torch.tensor([-1e30, 1e30, 1e30, 0.0])
    counts = histogram(row, SamplingParams(temperature=1e-3), 40)
    assert counts[0] == counts[3] == 0
    assert abs(deviation(counts[1:3], np.array([0.5, 0.5]))) < 4
