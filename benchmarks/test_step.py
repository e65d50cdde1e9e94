"""A whole step of the engine, end to end, on a model of the embedded model's shape: planning to sampled tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from llmkit import Request, SamplingParams
from llmkit.llm import LLM
from llmkit.model.loading import LoadedModel, load_model, native_dtype
from llmkit.model.spec import ModelSpec

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
PROMPT_LEN, ROUNDS = 64, 30
SAMPLING = {"greedy": SamplingParams(temperature=0.0), "sampled": SamplingParams(temperature=0.8, top_p=0.95)}


@cache
def model() -> LoadedModel:
    """Random weights, in the type that is fastest here."""
    cpu = torch.device("cpu")
    return load_model(ModelSpec("embedded shape", config=SHAPE), native_dtype(cpu), cpu)


def build(num_requests: int, params: SamplingParams, fused: bool = True) -> LLM:
    """An engine with `num_requests` waiting; their prompts differ."""
    llm = LLM(model(), scheduler={"name": "continuous", "max_num_seqs": 64}, max_model_len=256, fused=fused)
    params = params.model_copy(update={"max_tokens": 128, "ignore_eos": True})
    for number in range(num_requests):
        prompt = [(31 * number + 7 * place) % 4096 for place in range(PROMPT_LEN)]
        llm.engine.add(Request(str(number), prompt, params, seed=number))
    return llm


def measure_decode(benchmark: BenchmarkFixture, llm: LLM, num_requests: int) -> None:
    while len(llm.engine.step()) < num_requests:
        pass  # prompts still run
    outputs = benchmark.pedantic(llm.engine.step, rounds=ROUNDS, warmup_rounds=3)
    assert len(outputs) == num_requests
    if benchmark.enabled:
        benchmark.extra_info["tokens_per_second"] = round(num_requests / benchmark.stats.stats.median)


@pytest.mark.parametrize("num_requests", [1, 8, 64])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_decode_step(benchmark: BenchmarkFixture, sampling: str, num_requests: int) -> None:
    measure_decode(benchmark, build(num_requests, SAMPLING[sampling]), num_requests)


@pytest.mark.parametrize("num_requests", [1, 8, 64])
def test_a_decode_step_through_transformers_layers(benchmark: BenchmarkFixture, num_requests: int) -> None:
    """What models without fused layers pay."""
    measure_decode(benchmark, build(num_requests, SAMPLING["greedy"], fused=False), num_requests)


@pytest.mark.parametrize("num_requests", [1, 8])
def test_a_prompt_step(benchmark: BenchmarkFixture, num_requests: int) -> None:
    """The first step: all prompts at once."""

    def setup() -> tuple[tuple[LLM], dict[str, Any]]:
        return (build(num_requests, SAMPLING["greedy"]),), {}

    outputs = benchmark.pedantic(lambda llm: llm.engine.step(), setup=setup, rounds=10)
    assert len(outputs) == num_requests
