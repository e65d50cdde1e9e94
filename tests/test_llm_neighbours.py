"""A request whose activations are no numbers fails alone: neither beside it nor after it does a token change."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from llmkit import FinishReason, SamplingParams
from llmkit.model.loading import LoadedModel, load_model
from tests.tiny_llm import IDS, MakeLLM, noise

POISON = 9
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
BAD = [[POISON] * 3, [3, 4, POISON, 5, 6, 7, 8, 10, 11, 12], [POISON] * 20, [4, POISON]]


def good_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(POISON + 1, 97, (n,), generator=generator).tolist() for n in (1, 5, 8, 13, 21)]


@cache
def poisoned() -> LoadedModel:
    """Token `POISON` embeds as NaN; the head never chooses it."""
    model = load_model(IDS, torch.float64, torch.device("cpu"))
    noise(model.module)
    embedding: Any = model.module.get_input_embeddings()
    embedding.weight[POISON] = float("nan")
    return model


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_blocks", [64, 12])
@pytest.mark.parametrize("cache_name", ["paged", "contiguous"])
@pytest.mark.parametrize("max_chunk_tokens", [0, 3])
def test_nan_stays_with_its_request(
    make_llm: MakeLLM, cache_name: str, num_blocks: int, depth: int, fused: bool, max_chunk_tokens: int
) -> None:
    scheduler = {"name": "continuous", "max_num_seqs": 3, "max_chunk_tokens": max_chunk_tokens}
    options = {"scheduler": scheduler, "cache": cache_name, "num_blocks": num_blocks, "depth": depth, "fused": fused}
    good = good_prompts()
    alone = [output.token_ids for output in make_llm(poisoned(), **options).generate(good, GREEDY)]
    llm = make_llm(poisoned(), **options)
    mixed = llm.generate([prompt for pair in zip(good, [*BAD, BAD[0]], strict=True) for prompt in pair], GREEDY)
    assert all(output.finish_reason is FinishReason.ERROR for output in mixed[1::2])
    assert [output.token_ids for output in mixed[::2]] == alone
    assert [output.token_ids for output in llm.generate(good, GREEDY)] == alone
