"""On a GPU: the same definitions, the same independence of the batch, and no step waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkit.model.sampling import Sampler
from llmkit.model.sampling.device_sampler import DeviceSampler, split
from llmkit.model.sampling.draw import draw, most_likely
from llmkit.model.sampling.nucleus import Filters, draw_filtered
from llmkit.types import SamplingParams
from tests.kernels.running import run_cases
from tests.model.chisquare import deviation

pytestmark = pytest.mark.cuda
NUM = 48

EVERYTHING = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=4),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.1, logit_bias={3: 1.0}, bad_token_ids=(1, 2), min_tokens=16),
    SamplingParams(temperature=0.7, top_p=0.9, allowed_token_ids=tuple(range(60))),
    SamplingParams(top_k=40, min_p=0.02, presence_penalty=0.4, logprobs=0),
]


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Operations inside that make the host wait for the device raise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Crowd:
    def __init__(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        noise = torch.Generator().manual_seed(vocab_size)
        self.device = device
        self.logits = (torch.randn(NUM, vocab_size, generator=noise) * 2).to(dtype).to(device)
        self.tokens = torch.randint(0, vocab_size, (NUM, 40), generator=noise).to(device)

    def sampler(self, who: list[int]) -> Sampler:
        sampler = Sampler(self.logits.shape[1], NUM, self.device, frozenset({0}))
        for slot in who:
            sampler.set_slot(slot, EVERYTHING[slot % len(EVERYTHING)], slot, 5 + slot % 7)
        return sampler

    def sample(self, who: list[int]) -> list[int]:
        return self.sampler(who).sample(self.logits[who], who, [20 + slot % 9 for slot in who], self.tokens).tolist()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(4096, torch.bfloat16), (50257, torch.float32), (333, torch.float16)]
)
def test_the_same_request_gets_the_same_token_in_any_batch(
    gpu: torch.device, vocab_size: int, dtype: torch.dtype
) -> None:
    crowd = Crowd(vocab_size, dtype, gpu)
    together = crowd.sample(list(range(NUM)))
    order = np.random.default_rng(0)
    for size in (1, 1, 1, 2, 7, 30, NUM):
        who = [int(slot) for slot in order.permutation(NUM)[:size]]
        assert crowd.sample(who) == [together[slot] for slot in who]


@pytest.mark.parametrize("vocab_size", [333, 4096, 50257])
def test_cpu_and_gpu_choose_the_same_tokens(gpu: torch.device, vocab_size: int) -> None:
    """Up to a draw at the very edge between two tokens."""
    on_gpu = Crowd(vocab_size, torch.float32, gpu).sample(list(range(NUM)))
    on_cpu = Crowd(vocab_size, torch.float32, torch.device("cpu")).sample(list(range(NUM)))
    assert sum(a != b for a, b in zip(on_gpu, on_cpu, strict=True)) <= 1


def test_a_step_never_waits_for_the_device(gpu: torch.device) -> None:
    crowd, who = Crowd(32000, torch.bfloat16, gpu), list(range(NUM))
    with no_waiting():
        sampler = crowd.sampler(who)
        sampled = [sampler.sample(crowd.logits, who, [20 + step] * NUM, crowd.tokens) for step in range(3)]
    assert all(len(each.logprobs) == 2 * NUM // len(EVERYTHING) and each.errors == {} for each in sampled)


def test_draws_can_be_captured_and_replayed_with_new_noise(gpu: torch.device) -> None:
    noise = torch.Generator().manual_seed(0)
    scaled = torch.randn(8, 4096, generator=noise).to(gpu)
    first, second = torch.rand(2, 2, 8, 1, dtype=torch.float64, generator=noise).to(gpu)
    filters = Filters.of([SamplingParams(top_p=0.9, top_k=100)] * 8, 4096, gpu)

    def step(uniforms: Tensor) -> Tensor:
        plain, filtered = draw(scaled, uniforms, 64, 4096)[0], draw_filtered(scaled, filters, uniforms[0])[0]
        return torch.stack([plain, filtered, most_likely(scaled)[0]])

    expected, given = step(second), first.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given)
    given.copy_(second)
    graph.replay()
    assert torch.equal(captured, expected)


def test_kernels() -> None:
    run_cases("tests/model/device_sampler_cases.py")


def test_kernels_can_be_captured_and_replayed_for_other_rows(gpu: torch.device) -> None:
    made, rows = DeviceSampler(50257, 9, gpu), 8
    for slot in range(rows):
        made.set_slot(slot, 0.4 * slot, 12345 * slot)
    logits = torch.randn(rows, 50257, generator=torch.Generator().manual_seed(1)).to(gpu, torch.bfloat16)
    tokens = torch.zeros(9, 64, dtype=torch.int64, device=gpu)
    slots, positions = torch.arange(rows, device=gpu), torch.full((rows,), 3, device=gpu)
    made.choose(logits, slots, positions, tokens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token_ids, values = split(made.choose(logits, slots, positions, tokens))
    for shift in (0, 1, 5):
        slots.copy_((torch.arange(rows, device=gpu) + shift) % rows)
        positions.copy_(torch.arange(rows, device=gpu) + shift)
        made.set_slot(shift, 0.9, 7)
        graph.replay()
        wanted, _ = split(made.choose(logits, slots, positions))
        assert torch.equal(token_ids, wanted) and torch.equal(tokens[slots, positions], wanted)
        assert values.isfinite().all()


def test_draws_follow_the_softmax(gpu: torch.device) -> None:
    row = torch.randn(997, generator=torch.Generator().manual_seed(3)) * 2
    for params in (SamplingParams(temperature=0.7), SamplingParams(temperature=0.7, min_p=1e-12)):
        sampler = Sampler(997, 256, gpu, frozenset())
        for slot in range(256):
            sampler.set_slot(slot, params, slot, 1)
        logits, tokens = row.to(gpu).repeat(256, 1), torch.zeros(256, 1, dtype=torch.int64, device=gpu)
        steps = [sampler.sample(logits, list(range(256)), [step] * 256, tokens).tolist() for step in range(1, 151)]
        counts = np.bincount(np.array(steps).ravel(), minlength=997)
        assert abs(deviation(counts, (row.double() / 0.7).softmax(-1).numpy())) < 4


def test_ties(gpu: torch.device) -> None:
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, -1.0], device=gpu).repeat(3000, 1)
    assert most_likely(logits)[0].unique().tolist() == [1]
    uniforms = (torch.arange(3000, dtype=torch.float64, device=gpu) / 3000)[:, None]
    filters = Filters.of([SamplingParams(top_p=0.5)] * 3000, 6, gpu)
    counts = torch.bincount(draw_filtered(logits, filters, uniforms)[0], minlength=6)
    assert counts.tolist() == [0, 1500, 0, 1500, 0, 0]


def test_broken_rows_are_reported(gpu: torch.device) -> None:
    for params in EVERYTHING:
        sampler = Sampler(4096, 4, gpu, frozenset())
        logits = torch.zeros(4, 4096, device=gpu)
        logits[1, 17], logits[2], logits[3, 5] = torch.nan, -torch.inf, torch.inf
        for slot in range(4):
            sampler.set_slot(slot, params, slot, 2)
        sampled = sampler.sample(logits, [0, 1, 2, 3], [3] * 4, torch.ones(4, 8, dtype=torch.int64, device=gpu))
        assert sampled.errors.keys() == {1, 2, 3}
        assert all(0 <= token < 4096 for token in sampled.tolist())
