"""Top-k, top-p and min-p keep exactly what transformers' processors keep, and draws follow what is left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper
from transformers.generation.logits_process import TopPLogitsWarper

from llmkit.model.sampling import Sampler
from llmkit.model.sampling.nucleus import NUM_LARGEST, Filters, draw_filtered, order_all, order_largest
from llmkit.types import SamplingParams
from tests.model.chisquare import deviation

CPU = torch.device("cpu")
UNUSED = torch.zeros(1, 1, dtype=torch.int64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many tiny steps: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bell(rows: int, vocab_size: int, scale: float, seed: int) -> Tensor:
    """Distinct logits: without ties the definitions leave no choice."""
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)).double() * scale


def reference(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits [R, V] as transformers' `generate` would sample from them."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    unused: Any = torch.zeros(len(logits), 1, dtype=torch.int64)
    out: Tensor = processors(unused, cast(Any, logits.clone()))
    return out


def kept(logits: Tensor, params: SamplingParams) -> list[set[int]]:
    """The tokens every row of `logits` [R, V] may become: one draw in the middle of each kept token's share."""
    filters = Filters.of([params] * len(logits), logits.shape[1], CPU)
    scaled = logits / params.temperature
    ordered = order_all(scaled)
    start, _ = filters.start(ordered)
    supports = []
    for row, first in enumerate(start[:, 0].tolist()):
        mass = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.mass[row]])[first:]
        middles = ((mass[:-1] + mass[1:]) / 2 - mass[0]) / (mass[-1] - mass[0])
        rows = scaled[row].repeat(len(middles), 1)
        token_ids, _ = draw_filtered(rows, Filters.of([params] * len(rows), rows.shape[1], CPU), middles[:, None])
        supports.append(set(token_ids.tolist()))
    return supports


def label(params: SamplingParams) -> str:
    return ",".join(f"{name}={value}" for name, value in params.model_dump(exclude_defaults=True).items())


def settings(seed: int) -> SamplingParams:
    rng = random.Random(seed)
    kinds = seed % 7 + 1
    return SamplingParams(
        temperature=rng.choice([0.3, 0.7, 1.0, 1.8]),
        top_k=rng.choice([1, 2, 7, 50, 290, 5000]) if kinds & 1 else 0,
        top_p=rng.choice([0.01, 0.3, 0.8, 0.95, 0.999]) if kinds & 2 else 1.0,
        min_p=rng.choice([1e-6, 0.01, 0.1, 0.9, 1.0]) if kinds & 4 else 0.0,
    )


@pytest.mark.parametrize("seed", range(42))
def test_what_is_kept_is_what_transformers_keeps(seed: int) -> None:
    logits, params = bell(2, 307, 2.5, seed), settings(seed)
    survivors = [set(row.isfinite().nonzero()[:, 0].tolist()) for row in reference(logits, params)]
    assert kept(logits, params) == survivors


DRAWN = [
    SamplingParams(top_k=20),
    SamplingParams(temperature=1.5, top_p=0.8),
    SamplingParams(temperature=2.0, min_p=0.05),
    SamplingParams(temperature=2.0, top_k=50, top_p=0.95),
    SamplingParams(temperature=3.0, top_k=100, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("params", DRAWN, ids=label)
def test_draws_follow_the_filtered_distribution(params: SamplingParams) -> None:
    rows, vocab_size = 256, 307
    row = bell(1, vocab_size, 2.5, 5)
    sampler = Sampler(vocab_size, rows, CPU, frozenset())
    for slot in range(rows):
        sampler.set_slot(slot, params, slot, 1)
    logits, slots = row.float().expand(rows, -1), list(range(rows))
    drawn = [sampler.sample(logits, slots, [step] * rows, UNUSED).token_ids for step in range(1, 80)]
    counts = np.bincount(torch.cat(drawn).numpy(), minlength=vocab_size)
    probs = reference(row, params).softmax(-1)[0].numpy()
    assert 4 < np.count_nonzero(probs) < 200
    assert abs(deviation(counts, probs)) < 4


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.2, {1}), (0.21, {1, 2}), (0.4, {1, 2}), (0.8, {1, 2, 4, 6}), (0.81, {1, 2, 4, 6, 7})]
)
def test_ties_at_the_edge_of_top_p_go_to_the_lowest_ids(top_p: float, expected: set[int]) -> None:
    """Five equal tokens of probability 0.2; the number kept is transformers', the choice is argmax's."""
    logits = torch.full((1, 9), -torch.inf, dtype=torch.float64)
    logits[0, [1, 2, 4, 6, 7]] = 3.0
    # Sums of a fifth are not exact in binary: stay clear of the edge by more than their rounding.
    params = SamplingParams(top_p=top_p - 1e-9)
    assert kept(logits, params) == [expected]
    assert len(expected) == int(reference(logits, params).isfinite().sum())


def test_ties_at_the_edge_of_top_k_are_all_kept() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0, 0.0, 3.0]], dtype=torch.float64)
    assert kept(logits, SamplingParams(top_k=2)) == [{1, 2, 3, 5}]
    assert kept(logits, SamplingParams(top_k=5)) == [{0, 1, 2, 3, 5}]


def test_ties_in_the_middle_are_told_apart() -> None:
    """Every one of many equal tokens is drawn equally often, wherever the filter's edge lies."""
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, -1.0]).repeat(3000, 1)
    filters = Filters.of([SamplingParams(min_p=0.3)] * 3000, 6, CPU)
    uniforms = torch.arange(3000, dtype=torch.float64)[:, None] / 3000
    counts = torch.bincount(draw_filtered(logits, filters, uniforms)[0], minlength=6)
    share = logits[0].masked_fill(logits[0] < 0, -torch.inf).softmax(-1)
    assert (counts / 3000 - share).abs().max() < 2 / 3000


def test_filters_that_keep_everything_keep_everything() -> None:
    logits = bell(3, 40, 1.0, 0)
    assert kept(logits, SamplingParams(top_k=41)) == [set(range(40))] * 3
    assert kept(logits, SamplingParams(top_k=40, min_p=1e-9)) == [set(range(40))] * 3


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-6), SamplingParams(min_p=1.0)])
def test_the_tightest_filters_are_greedy(params: SamplingParams) -> None:
    logits = bell(6, 200, 1.0, 4)
    assert kept(logits, params) == [{int(best)} for best in logits.argmax(-1)]


WIDE = 9 * NUM_LARGEST
WIDE_ROWS = {
    "peaked": bell(1, WIDE, 4.0, 1).float(),
    "nearly flat": bell(1, WIDE, 0.01, 2).float(),
    "rounded": bell(1, WIDE, 1.0, 3).bfloat16().float(),
    "few allowed": torch.full((1, WIDE), -torch.inf).index_fill(1, torch.tensor([5, 77, 9000]), 1.0),
    "constant": torch.zeros(1, WIDE),
}
WIDE_PARAMS = [
    SamplingParams(top_k=20),
    SamplingParams(top_k=NUM_LARGEST),
    SamplingParams(top_k=NUM_LARGEST + 1),
    SamplingParams(top_p=0.9),
    SamplingParams(top_k=300, top_p=0.5),
    SamplingParams(top_k=3000, top_p=0.3),
    SamplingParams(min_p=0.1),
    SamplingParams(top_p=0.999, min_p=0.4),
]


@pytest.mark.parametrize("name", WIDE_ROWS)
@pytest.mark.parametrize("params", WIDE_PARAMS, ids=label)
def test_looking_at_the_largest_first_changes_nothing(name: str, params: SamplingParams) -> None:
    row, num = WIDE_ROWS[name], 64
    filters = Filters.of([params] * num, WIDE, CPU)
    uniforms = ((torch.arange(num, dtype=torch.float64) + 0.5) / num)[:, None]
    rows = row.repeat(num, 1)
    token_ids, _ = draw_filtered(rows, filters, uniforms)
    ordered = order_all(row)
    start, _ = Filters.of([params], WIDE, CPU).start(ordered)
    mass, first = ordered.mass[0], int(start)
    below = mass[first - 1] if first else 0.0
    rank = torch.searchsorted(mass, below + uniforms[:, 0] * (mass[-1] - below), right=True)
    assert row[0, token_ids].tolist() == ordered.ascending[0, rank].tolist()


def test_the_short_cut_is_taken_where_it_can_and_only_there() -> None:
    def is_whole(name: str, params: SamplingParams) -> bool:
        return bool(Filters.of([params], WIDE, CPU).start(order_largest(WIDE_ROWS[name]))[1])

    assert is_whole("peaked", SamplingParams(top_p=0.9)) and is_whole("few allowed", SamplingParams(top_p=0.9))
    assert is_whole("nearly flat", SamplingParams(top_k=20)) and is_whole("peaked", SamplingParams(min_p=0.1))
    assert not is_whole("nearly flat", SamplingParams(top_p=0.9))
    assert not is_whole("constant", SamplingParams(top_k=20))
    assert not is_whole("peaked", SamplingParams(top_k=NUM_LARGEST + 1))
