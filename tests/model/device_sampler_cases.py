"""The sampler's kernels against the sampler for CPUs: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkit.model.sampling import Sampler
from llmkit.model.sampling import sampler as sampler_module
from llmkit.model.sampling.device_sampler import DeviceSampler, split
from llmkit.model.sampling.draw import block_size_for, draw
from llmkit.model.sampling.noise import noise_key, uniforms
from llmkit.model.sampling.nucleus import Filters, draw_filtered
from llmkit.types import SamplingParams
from tests.model.chisquare import deviation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 24
TEMPERATURES = [0.0, 0.7, 1.0, 0.05, 3.0, 1e-4]


def numbered(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def sampler(vocab_size: int, temperatures: list[float]) -> DeviceSampler:
    """Slot i has temperature i of the list and the noise of seed i."""
    made = DeviceSampler(vocab_size, len(temperatures) + 1, DEVICE)
    for slot, temperature in enumerate(temperatures):
        made.set_slot(slot, temperature, noise_key(slot))
    return made


def drawn_on_cpu(logits: Tensor, temperatures: list[float], slots: list[int], positions: list[int]) -> Tensor:
    """What `draw` chooses for rows of `slots`, where their temperature is not 0."""
    rows, vocab_size = logits.shape
    size = block_size_for(vocab_size)
    scaled = torch.full((rows, -(-vocab_size // size) * size), -torch.inf)
    scaled[:, :vocab_size] = logits.cpu().float() / torch.tensor([temperatures[slot] or 1.0 for slot in slots])[:, None]
    keys = np.array([noise_key(slot) for slot in slots], dtype=np.uint64)
    noise = torch.from_numpy(uniforms(keys, np.array(positions, dtype=np.uint64)))
    return draw(scaled, noise, size, vocab_size)[0]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (1, torch.float32),
        (7, torch.float16),
        (64, torch.bfloat16),
        (97, torch.float32),
        (1000, torch.float16),
        (9001, torch.bfloat16),
        (9001, torch.float32),
    ],
)
def test_chooses_what_the_cpu_chooses(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(ROWS, vocab_size + 3, generator=generator) * 3).to(dtype).to(DEVICE)[:, :vocab_size]
    temperatures = TEMPERATURES * (ROWS // len(TEMPERATURES))
    slots = list(reversed(range(ROWS)))
    positions = [3 + 17 * slot % 29 for slot in slots]
    tokens = torch.full((ROWS + 1, 40), -1, dtype=torch.int64, device=DEVICE)
    made = sampler(vocab_size, temperatures)
    token_ids, values = split(made.choose(logits, numbered(slots), numbered(positions), tokens))
    assert values.isfinite().all()
    wanted = drawn_on_cpu(logits, temperatures, slots, positions)
    is_greedy = torch.tensor([temperatures[slot] == 0 for slot in slots])
    wanted = torch.where(is_greedy, torch.from_numpy(logits.cpu().float().numpy().argmax(-1)), wanted)
    assert token_ids.cpu().tolist() == wanted.tolist()
    stored = tokens[slots, positions]
    assert torch.equal(stored, token_ids) and int((tokens >= 0).sum()) == ROWS


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "step"),
    [
        (7, torch.float32, 0.0),
        (97, torch.bfloat16, 0.25),
        (1000, torch.float32, 0.0),
        (1000, torch.float16, 0.25),
        (20000, torch.bfloat16, 0.0),
    ],
)
def test_filters_keep_what_they_keep_on_the_cpu(vocab_size: int, dtype: torch.dtype, step: float) -> None:
    """Steps between close logits make many equals, which all filters may cut through."""
    generator = torch.Generator().manual_seed(vocab_size)
    combinations = itertools.product((0, 1, 40), (1.0, 0.9, 0.3), (0.0, 0.2))
    params = [
        SamplingParams(temperature=(0.6, 1.5, 1.0, 0.8)[index % 4], top_k=top_k, top_p=top_p, min_p=min_p)
        for index, (top_k, top_p, min_p) in enumerate(combinations)
    ]
    logits = torch.randn(len(params), vocab_size, generator=generator)
    logits = ((logits / 2 / step).round() * step if step else logits * 3).to(dtype)
    logits[:, ::5] = -torch.inf
    positions = [3 + 17 * slot % 29 for slot in range(len(params))]
    made = DeviceSampler(vocab_size, len(params), DEVICE)
    for slot, asked in enumerate(params):
        made.set_slot(slot, asked.temperature, noise_key(slot), asked.top_k, asked.top_p, asked.min_p)
    token_ids, values = split(
        made.choose_filtered(logits.to(DEVICE), numbered(list(range(len(params)))), numbered(positions))
    )
    assert values.isfinite().all()
    scaled = logits.float() / torch.tensor([[asked.temperature] for asked in params])
    keys = np.array([noise_key(slot) for slot in range(len(params))], dtype=np.uint64)
    noise = torch.from_numpy(uniforms(keys, np.array(positions, dtype=np.uint64)))
    wanted, _ = draw_filtered(scaled, Filters.of(params, vocab_size, torch.device("cpu")), noise[0])
    assert token_ids.tolist() == wanted.tolist()


def test_draws_follow_the_softmax() -> None:
    rows = 20000 if DEVICE.type == "cuda" else 600
    row = torch.randn(90, generator=torch.Generator().manual_seed(3)) * 2
    row[[4, 40, 89]] = -torch.inf
    made = sampler(90, [0.7] * rows)
    same = torch.zeros(rows, dtype=torch.int64, device=DEVICE) + 5
    token_ids, _ = split(made.choose(row.to(DEVICE).repeat(rows, 1), numbered(list(range(rows))), same))
    counts = np.bincount(token_ids.cpu().numpy(), minlength=90)
    assert abs(deviation(counts, (row.double() / 0.7).softmax(-1).numpy())) < 4


def test_the_lowest_of_equals_is_greedy() -> None:
    logits = torch.zeros(3, 100, device=DEVICE)
    logits[1, [70, 30, 99]], logits[2, 99] = 1.0, 1.0
    zeros = numbered([0, 0, 0])
    assert sampler(100, [0.0]).choose(logits, zeros, zeros)[0].tolist() == [0, 30, 99]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_broken_rows_are_told_and_get_a_valid_id(temperature: float) -> None:
    logits = torch.zeros(5, 300, device=DEVICE)
    logits[1, 17], logits[2], logits[3, 5], logits[4, 1:] = torch.nan, -torch.inf, torch.inf, -torch.inf
    zeros = numbered([0] * 5)
    made = sampler(300, [temperature])
    token_ids, values = split(made.choose(logits, zeros, zeros))
    if temperature > 0:
        filtered_ids, filtered_values = split(made.choose_filtered(logits, zeros, zeros))
        assert torch.equal(filtered_values.isfinite(), values.isfinite())
        assert filtered_ids[4] == 0 and all(0 <= token_id < 300 for token_id in filtered_ids.tolist())
    assert values.isfinite().tolist() == [True, False, False, False, True]
    assert token_ids[4] == 0 and all(0 <= token_id < 300 for token_id in token_ids.tolist())


def test_slots_never_set_are_greedy() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    token_ids, _ = split(sampler(50, [1.0]).choose(logits, numbered([1]), numbered([0])))
    assert token_ids.tolist() == logits.argmax(-1).tolist()


ASKS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.1, logit_bias={3: 1.0}, bad_token_ids=(1, 2), min_tokens=16),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.0, logprobs=2),
    SamplingParams(temperature=0, repetition_penalty=1.2),
]


@pytest.mark.parametrize("who", [range(2), range(len(ASKS)), [1], [4, 1, 3]])
def test_the_batched_sampler_chooses_the_same_with_and_without(who: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size, who, cpu = 300, list(who), torch.device("cpu")
    logits = torch.randn(len(who), vocab_size, generator=torch.Generator().manual_seed(len(who))) * 3
    tokens = torch.randint(vocab_size, (len(ASKS), 40), generator=torch.Generator().manual_seed(1))
    without = Sampler(vocab_size, len(ASKS), cpu, frozenset({0}))
    monkeypatch.setattr(
        sampler_module, "device_sampler", lambda size, slots, device: DeviceSampler(size, slots, device)
    )
    made = Sampler(vocab_size, len(ASKS), DEVICE, frozenset({0}))
    for slot in who:
        without.set_slot(slot, ASKS[slot], 7 * slot, 5)
        made.set_slot(slot, ASKS[slot], 7 * slot, 5)
    positions = [20 + slot for slot in who]
    wanted = without.sample(logits, who, positions, tokens).tolist()
    assert made.sample(logits.to(DEVICE), who, positions, tokens.to(DEVICE)).tolist() == wanted
    assert made.is_plain(who, positions) == all(slot < 2 for slot in who)
