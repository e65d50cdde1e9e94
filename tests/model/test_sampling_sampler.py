"""The sampler as a whole: a row's token depends on nothing but the row, faults stay in their row, logprobs are raw."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from llmkit.model.sampling import Sampler, chunks
from llmkit.types import SamplingParams

CPU = torch.device("cpu")
NUM = 40


def any_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Any mixture of all that a request can ask for."""

    def sometimes(value: object, otherwise: object) -> object:
        return value if rng.random() < 0.35 else otherwise

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.sample(range(vocab_size), count))

    return SamplingParams.model_validate(
        {
            "temperature": rng.choice([0.0, 0.6, 1.0, 1.7]),
            "top_k": sometimes(rng.randint(1, 60), 0),
            "top_p": sometimes(rng.uniform(0.3, 0.99), 1.0),
            "min_p": sometimes(rng.uniform(0.001, 0.3), 0.0),
            "repetition_penalty": sometimes(rng.uniform(0.7, 1.5), 1.0),
            "presence_penalty": sometimes(rng.uniform(-1, 1), 0.0),
            "frequency_penalty": sometimes(rng.uniform(-1, 1), 0.0),
            "logit_bias": sometimes(dict.fromkeys(ids(3), 1.5), {}),
            "allowed_token_ids": sometimes(ids(vocab_size // 2), None),
            "bad_token_ids": sometimes(ids(5), ()),
            "min_tokens": sometimes(rng.randint(1, 16), 0),
            "logprobs": sometimes(rng.randint(0, 5), None),
        }
    )


class Crowd:
    """NUM requests with their own parameters, seeds, histories and logits."""

    def __init__(self, vocab_size: int, dtype: torch.dtype, seed: int) -> None:
        rng = random.Random(seed)
        self.vocab_size = vocab_size
        self.params = [any_params(rng, vocab_size) for _ in range(NUM)]
        self.prompts = [rng.randint(1, 10) for _ in range(NUM)]
        self.positions = [prompt + rng.randint(0, 12) for prompt in self.prompts]
        noise = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, vocab_size, (NUM, 24), generator=noise)
        self.logits = (torch.randn(NUM, vocab_size, generator=noise) * 2).to(dtype)

    def sample(self, who: list[int], slots: list[int]) -> list[int]:
        """Tokens of the requests `who`, in that order, held in `slots` of a new sampler."""
        sampler = Sampler(self.vocab_size, NUM, CPU, frozenset({1}))
        tokens = torch.zeros_like(self.tokens)
        for request, slot in zip(who, slots, strict=True):
            sampler.set_slot(slot, self.params[request], 1000 + request, self.prompts[request])
            tokens[slot] = self.tokens[request]
        return sampler.sample(self.logits[who], slots, [self.positions[i] for i in who], tokens).tolist()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(64, torch.float32), (1000, torch.bfloat16), (4096, torch.float32), (9001, torch.float32), (300, torch.float64)],
)
def test_the_same_request_gets_the_same_token_in_any_batch(vocab_size: int, dtype: torch.dtype) -> None:
    crowd = Crowd(vocab_size, dtype, vocab_size)
    together = crowd.sample(list(range(NUM)), list(range(NUM)))
    assert len(set(together)) > NUM // 2
    rng = random.Random(1)
    for size in (1,) * 12 + (2, 3, 9, 17, NUM, NUM):
        who = rng.sample(range(NUM), size)
        assert crowd.sample(who, rng.sample(range(NUM), size)) == [together[i] for i in who]


def test_the_number_of_threads_changes_nothing() -> None:
    crowd, threads = Crowd(4100, torch.float32, 3), torch.get_num_threads()
    try:
        results = []
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            results.append(crowd.sample(list(range(NUM)), list(range(NUM))))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


def test_tokens_differ_between_seeds_and_positions_and_repeat_for_equal_ones() -> None:
    sampler = Sampler(500, 4, CPU, frozenset())
    for slot, seed in enumerate((1, 2, 1, (1 << 63) - 1)):
        sampler.set_slot(slot, SamplingParams(), seed, 1)
    logits, tokens = torch.zeros(4, 500), torch.zeros(4, 1, dtype=torch.int64)
    steps = [sampler.sample(logits, [0, 1, 2, 3], [p] * 4, tokens).tolist() for p in range(1, 60)]
    first, second, again, far = zip(*steps, strict=True)
    assert first == again
    for one, other in ((first, second), (first, far), (first[1:], first[:-1])):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 4


def test_nothing_handed_in_is_changed_and_torch_random_state_is_left_alone() -> None:
    crowd = Crowd(512, torch.float32, 5)
    logits, tokens, state = crowd.logits.clone(), crowd.tokens.clone(), torch.get_rng_state()
    crowd.sample(list(range(NUM)), list(range(NUM)))
    assert torch.equal(crowd.logits, logits) and torch.equal(crowd.tokens, tokens)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_runs_in_inference_mode() -> None:
    with torch.inference_mode():
        crowd = Crowd(512, torch.float32, 5)
        inside = crowd.sample(list(range(NUM)), list(range(NUM)))
    assert inside == Crowd(512, torch.float32, 5).sample(list(range(NUM)), list(range(NUM)))


KINDS = {
    "greedy": SamplingParams(temperature=0),
    "greedy, penalised": SamplingParams(temperature=0, presence_penalty=0.5),
    "plain": SamplingParams(),
    "plain, biased": SamplingParams(logit_bias={2: 1.0}),
    "top_p": SamplingParams(top_p=0.9),
    "top_k, min_p": SamplingParams(top_k=9, min_p=0.01),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [33, 64, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_rows_are_reported_and_their_neighbours_unharmed(kind: str, vocab_size: int, dtype: torch.dtype) -> None:
    params, tokens = KINDS[kind], torch.ones(6, 8, dtype=torch.int64)
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[1, 17] = torch.nan
    logits[2] = -torch.inf
    logits[4, 5] = torch.inf
    sampler = Sampler(vocab_size, 6, CPU, frozenset())
    for slot in range(6):
        barred = {"allowed_token_ids": (3,), "bad_token_ids": (3,)} if slot == 5 else {}
        sampler.set_slot(slot, params.model_copy(update=barred), slot, 2)
    sampled = sampler.sample(logits, list(range(6)), [7] * 6, tokens)
    assert sampled.errors.keys() == {1, 2, 4, 5}
    assert all("NaN or infinite" in message and "\n" not in message for message in sampled.errors.values())
    assert all(0 <= token < vocab_size for token in sampled.tolist())
    healthy = sampler.sample(logits[[0, 3]], [0, 3], [7, 7], tokens)
    assert healthy.errors == {}
    assert healthy.tolist() == [sampled.tolist()[0], sampled.tolist()[3]]


def test_a_masked_nan_does_no_harm() -> None:
    sampler = Sampler(8, 1, CPU, frozenset())
    sampler.set_slot(0, SamplingParams(bad_token_ids=(2,)), 0, 1)
    logits = torch.zeros(1, 8)
    logits[0, 2] = torch.nan
    sampled = sampler.sample(logits, [0], [1], torch.zeros(1, 2, dtype=torch.int64))
    assert sampled.errors == {} and sampled.tolist() != [2]


def test_a_slot_forgets_its_last_request() -> None:
    sampler = Sampler(16, 1, CPU, frozenset({3}))
    logits, tokens = torch.zeros(1, 16), torch.zeros(1, 4, dtype=torch.int64)
    logits[0, 3] = 9.0
    demanding = SamplingParams(temperature=0, min_tokens=9, logit_bias={7: 5.0}, bad_token_ids=(4,), logprobs=2)
    sampler.set_slot(0, demanding, 0, 1)
    assert sampler.sample(logits, [0], [1], tokens).tolist() == [7]
    sampler.set_slot(0, SamplingParams(temperature=0), 0, 1)
    sampled = sampler.sample(logits, [0], [1], tokens)
    assert sampled.tolist() == [3] and sampled.logprobs == {}


def test_a_step_that_samples_nothing() -> None:
    sampled = Sampler(4, 2, CPU, frozenset()).sample(torch.zeros(0, 4), [], [], torch.zeros(2, 2, dtype=torch.int64))
    assert sampled.tolist() == [] and sampled.errors == {} and sampled.logprobs == {}


def test_an_empty_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="slot 1 is sampled before"):
        Sampler(4, 2, CPU, frozenset()).sample(torch.zeros(1, 4), [1], [1], torch.zeros(2, 2, dtype=torch.int64))


def reference_logprobs(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_model_for_rows_that_ask(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 600, generator=torch.Generator().manual_seed(8)).double() * 2).to(dtype)
    asked = {1: 5, 2: 0, 3: 20}
    sampler = Sampler(600, 4, CPU, frozenset())
    for slot in range(4):
        params = SamplingParams(
            temperature=0.5, top_k=40, repetition_penalty=1.5, logit_bias={9: 3.0}, logprobs=asked.get(slot)
        )
        sampler.set_slot(slot, params, slot, 3)
    sampled = sampler.sample(logits, [0, 1, 2, 3], [5] * 4, torch.full((4, 6), 9))
    expected, tokens = reference_logprobs(logits), sampled.tolist()
    assert sampled.logprobs.keys() == asked.keys()
    for row, entry in sampled.logprobs.items():
        assert entry.token_id == tokens[row]
        assert entry.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        assert entry.rank == int((expected[row] > expected[row, tokens[row]]).sum()) + 1
        best = expected[row].sort(descending=True, stable=True)
        assert len(entry.top) == asked[row]
        values = [value for _, value in entry.top]
        assert values == pytest.approx(best.values[: asked[row]].tolist(), abs=1e-5)
        assert [float(expected[row, token]) for token, _ in entry.top] == pytest.approx(values, abs=1e-5)
        assert entry.rank > asked[row] or tokens[row] in dict(entry.top)


def test_greedy_has_rank_one() -> None:
    sampler = Sampler(100, 1, CPU, frozenset())
    sampler.set_slot(0, SamplingParams(temperature=0, logprobs=1), 0, 1)
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(3))
    entry = sampler.sample(logits, [0], [1], torch.zeros(1, 2, dtype=torch.int64)).logprobs[0]
    assert entry.rank == 1 and entry.top == ((entry.token_id, entry.logprob),)


def test_prompt_logprobs_in_one_piece_and_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(4)
    logits, token_ids = torch.randn(7, 90, generator=noise), torch.randint(0, 90, (7,), generator=noise)
    sampler = Sampler(90, 1, CPU, frozenset())
    whole = sampler.prompt_logprobs(logits, token_ids, 3)
    monkeypatch.setattr(chunks, "MAX_CPU_ELEMENTS", 200)
    assert sampler.prompt_logprobs(logits, token_ids.int(), 3) == whole
    expected = reference_logprobs(logits)
    assert [entry.token_id for entry in whole] == token_ids.tolist()
    assert [entry.logprob for entry in whole] == pytest.approx(expected.gather(1, token_ids[:, None])[:, 0].tolist())
    assert [[token for token, _ in entry.top] for entry in whole] == expected.topk(3).indices.tolist()
    assert sampler.prompt_logprobs(logits[:0], token_ids[:0], 3) == ()


def test_chunks_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(1000, torch.bfloat16, 6)
    whole = crowd.sample(list(range(NUM)), list(range(NUM)))
    monkeypatch.setattr(chunks, "MAX_CPU_ELEMENTS", 3000)
    assert crowd.sample(list(range(NUM)), list(range(NUM))) == whole
