"""Prompts that begin alike, asked again: tokens of `transformers.generate`, most of the prompts not computed."""

from __future__ import annotations

import pytest
import torch

from llmkit.llm import LLM
from llmkit.types import SamplingParams
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import BLOCK_SIZE, GREEDY, ROOMY, Tap, prompts, reference
from tests.equality.zoo import tiny_model

(STEM,) = prompts((6 * BLOCK_SIZE,))
EVICTING = 14
ENDS = prompts((3, 2, 7, 1))
WAVES = [
    [STEM],
    [STEM, STEM + ENDS[0], STEM + ENDS[1], STEM[:17] + ENDS[2]],
    [STEM + ENDS[0] + ENDS[1], STEM[:17] + ENDS[2] + ENDS[3], STEM, ENDS[2] + STEM],
]


@pytest.mark.parametrize(
    ("name", "cache", "depth", "num_blocks"),
    [
        ("llama", "paged", 0, ROOMY),
        ("llama", "paged", 1, EVICTING),
        ("llama", "radix", 0, EVICTING),
        ("llama", "radix", 1, ROOMY),
        ("gemma2", "paged", 1, ROOMY),
        ("gemma2", "radix", 0, EVICTING),
    ],
)
def test_repeated_prompts_give_the_tokens_of_transformers(name: str, depth: int, num_blocks: int, cache: str) -> None:
    model = tiny_model(name)
    plain = model.as_transformers()
    llm = LLM(model, cache=cache, block_size=BLOCK_SIZE, num_blocks=num_blocks, depth=depth, fused=False)
    tap, number, num_cached = Tap(llm), 0, []
    for wave in WAVES:
        with ReallyFloat64():
            outputs = llm.generate(wave, GREEDY)
            for output in outputs:
                wanted = reference(plain, list(output.prompt_token_ids))
                assert list(output.token_ids) == wanted.token_ids
                error = (tap.of(number, list(output.prompt_token_ids)) - wanted.logits).abs().max()
                assert error < 1e-9
                number += 1
        llm.engine.planner.allocator.check()
        num_cached.append([output.metrics.num_cached_tokens for output in outputs])
    if num_blocks == ROOMY:
        assert num_cached == [[0], [25, 30, 30, 15], [30, 20, 25, 0]]
    assert sum(map(sum, num_cached)) >= 60


def test_sampling_and_log_probabilities_do_not_depend_on_what_is_cached() -> None:
    model = tiny_model("llama")
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=5, logprobs=2, ignore_eos=True)
    asks = params.model_copy(update={"prompt_logprobs": 2})
    cold, warm = (
        LLM(model, cache={"name": "paged", "prefix": on}, block_size=BLOCK_SIZE, num_blocks=48) for on in (False, True)
    )
    for llm in (cold, warm):
        llm.generate([STEM + ENDS[0]], params)
    for each in (params, asks):
        (wanted,), (got,) = (llm.generate([STEM + ENDS[0]], each) for llm in (cold, warm))
        assert got.metrics.num_cached_tokens == (30 if each is params else 0) and not wanted.metrics.num_cached_tokens
        assert got.token_ids == wanted.token_ids
        for mine, theirs in ((got.logprobs, wanted.logprobs), (got.prompt_logprobs, wanted.prompt_logprobs)):
            assert (mine is None) == (theirs is None)
            for one, other in zip(mine or (), theirs or (), strict=True):
                assert one.token_id == other.token_id and one.rank == other.rank
                assert torch.isclose(torch.tensor(one.logprob), torch.tensor(other.logprob), atol=1e-5)
