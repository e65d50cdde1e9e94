"""Bias, masks and penalties change exactly the logits they name, by transformers' and OpenAI's definitions."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from llmkit.errors import RequestError
from llmkit.model.sampling import Sampler
from llmkit.model.sampling.edits import BatchEdits, SlotEdits
from llmkit.model.sampling.penalties import Penalties
from llmkit.types import SamplingParams

CPU = torch.device("cpu")
V = 50
INF = float("inf")


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)).double() * 3


def edited(logits: Tensor, rows: dict[int, SamplingParams], early: frozenset[int] = frozenset()) -> Tensor:
    """`logits` after the edits of some of its rows; token 0 ends a request."""
    edits = [(row, SlotEdits.of(params, V, frozenset({0}), CPU), row in early) for row, params in rows.items()]
    out = logits.clone()
    BatchEdits.of(edits, V).apply(out)
    return out


def test_bias_is_added_to_the_tokens_it_names() -> None:
    logits = logits_of(3)
    out = edited(logits, {0: SamplingParams(logit_bias={4: 2.5, 49: -100.0}), 2: SamplingParams(logit_bias={0: 1.0})})
    expected = logits.clone()
    expected[0, 4] += 2.5
    expected[0, 49] -= 100
    expected[2, 0] += 1
    assert torch.equal(out, expected)


def test_masks_bar_everything_they_should() -> None:
    logits = logits_of(4)
    out = edited(
        logits,
        {
            0: SamplingParams(bad_token_ids=(3, 3, 7)),
            1: SamplingParams(allowed_token_ids=(9, 9, 1)),
            3: SamplingParams(allowed_token_ids=(5, 6, 7), bad_token_ids=(6, 40), logit_bias={5: 1.0, 8: 9.0}),
        },
    )
    expected = torch.full_like(logits, -INF)
    expected[0] = logits[0].index_fill(0, torch.tensor([3, 7]), -INF)
    expected[1, [1, 9]] = logits[1, [1, 9]]
    expected[2] = logits[2]
    expected[3, 5], expected[3, 7] = logits[3, 5] + 1, logits[3, 7]
    assert torch.equal(out, expected)


def test_min_tokens_bars_what_would_end_the_request_and_only_while_early() -> None:
    logits = logits_of(3)
    params = SamplingParams(min_tokens=2, stop_token_ids=(8, 9, V + 5))
    out = edited(logits, {0: params, 1: params, 2: params.model_copy(update={"ignore_eos": True})}, frozenset({0, 2}))
    expected = logits.clone()
    expected[0, [0, 8, 9]] = -INF
    expected[2, [8, 9]] = -INF
    assert torch.equal(out, expected)


def test_min_tokens_counts_outputs() -> None:
    """A model that always wants to end, with a prompt of 3: outputs 0 and 1 may not, output 2 may."""
    sampler = Sampler(V, 2, CPU, frozenset({0}))
    logits = torch.zeros(2, V)
    logits[:, 0], logits[:, 1] = 5.0, 1.0
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    sampler.set_slot(0, SamplingParams(temperature=0, min_tokens=2), 0, 3)
    sampler.set_slot(1, SamplingParams(temperature=0), 0, 3)
    chosen = [sampler.sample(logits, [0, 1], [position, position], tokens).tolist() for position in (3, 4, 5, 6)]
    assert chosen == [[1, 0], [1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={V: 1.0}),
        SamplingParams(bad_token_ids=(1, -1)),
        SamplingParams(allowed_token_ids=(1, V)),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(params: SamplingParams) -> None:
    with pytest.raises(RequestError, match=r"names token -?\d+; the vocabulary has ids 0 to 49"):
        Sampler(V, 1, CPU, frozenset()).set_slot(0, params, 0, 1)


Row = tuple[int, int, int, SamplingParams]


def histories(seed: int) -> tuple[list[Row], list[int], Tensor]:
    """Six rows in shuffled slots, four of them penalised: (row, slot, prompt length, parameters); lengths; tokens."""
    rng = random.Random(seed)
    slots = rng.sample(range(8), 6)
    prompts = [rng.randint(1, 12) for _ in slots]
    lengths = [prompt + rng.choice([0, 1, 20]) for prompt in prompts]
    # Few distinct tokens, so that they repeat; beyond a row's end lies the previous owner's history.
    tokens = torch.tensor([[rng.randrange(15) for _ in range(40)] for _ in range(8)])
    params = [
        SamplingParams(
            repetition_penalty=rng.choice([0.5, 1.0, 1.3]) if seed % 2 else 1.0,
            presence_penalty=rng.choice([-1.0, 0.0, 0.7]),
            frequency_penalty=rng.choice([-0.3, 0.0, 0.4]),
        )
        for _ in slots
    ]
    rows = [(row, slots[row], prompts[row], params[row]) for row in sorted(rng.sample(range(6), 4))]
    return rows, lengths, tokens


@pytest.mark.parametrize("seed", range(12))
def test_penalties_follow_their_definitions(seed: int) -> None:
    rows, lengths, tokens = histories(seed)
    logits = logits_of(6, seed)
    logits[:, 3] = -INF
    expected = logits.clone()
    for row, slot, prompt, params in rows:
        history = tokens[slot, : lengths[row]]
        processor = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        expected[row] = processor(history[None], expected[row][None].clone())[0]
        for token, count in Counter(history[prompt:].tolist()).items():
            expected[row, token] -= params.frequency_penalty * count + params.presence_penalty
    out = logits.clone()
    Penalties.of(rows, CPU).apply(out, lengths, tokens)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(out == logits, expected == logits)


def test_penalties_of_one_row_do_not_depend_on_the_others() -> None:
    for seed in range(6):
        rows, lengths, tokens = histories(seed)
        logits = logits_of(6, seed).float()
        together = logits.clone()
        Penalties.of(rows, CPU).apply(together, lengths, tokens)
        for each in rows:
            alone = logits.clone()
            Penalties.of([each], CPU).apply(alone, lengths, tokens)
            assert torch.equal(alone[each[0]], together[each[0]])


def test_bias_comes_before_the_repetition_penalty_and_that_before_the_filters() -> None:
    """Raw logits 1.0 and 0.9; a bias of 1 lifts the second to 1.9, halved by the penalty it falls below the first."""
    sampler = Sampler(4, 1, CPU, frozenset())
    logits = torch.tensor([[1.0, 0.9, -5.0, -5.0]])
    tokens = torch.tensor([[1, 2, 2]])
    for penalty, token in ((2.0, 0), (1.5, 1)):
        params = SamplingParams(temperature=0.5, top_k=1, logit_bias={1: 1.0}, repetition_penalty=penalty)
        sampler.set_slot(0, params, 1, 1)
        assert sampler.sample(logits, [0], [3], tokens).tolist() == [token]
