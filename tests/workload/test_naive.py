"""The baseline is what it says: greedy, with a KV cache, exactly as long as asked, one prompt after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmkit.errors import LlmkitError
from llmkit.interfaces.clock import MonotonicClock
from llmkit.workload.naive import NaiveBaseline

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model() -> Any:
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = LlamaForCausalLM(config).to(torch.float64)
        for parameter in built.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.4)
    return built


def argmax_loop(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits = model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_it_is_greedy_decoding(model: Any) -> None:
    outputs, _ = NaiveBaseline(model, MonotonicClock()).generate(PROMPTS, 12)
    assert outputs == [argmax_loop(model, prompt, 12) for prompt in PROMPTS]
    assert len({token for output in outputs for token in output}) > 8


def test_it_goes_on_after_every_token_the_model_would_stop_at(model: Any) -> None:
    model.generation_config.eos_token_id = list(range(60))
    outputs, _ = NaiveBaseline(model, MonotonicClock()).generate(PROMPTS, 9)
    assert [len(output) for output in outputs] == [9, 9, 9]


def test_it_does_not_sample_even_if_the_model_would(model: Any) -> None:
    model.generation_config.do_sample = True
    model.generation_config.temperature = 2.0
    outputs, _ = NaiveBaseline(model, MonotonicClock()).generate(PROMPTS, 9)
    assert outputs == [argmax_loop(model, prompt, 9) for prompt in PROMPTS]


def test_prompts_run_one_at_a_time_with_a_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward = model.forward

    def watched(input_ids: Any, **options: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", watched)
    _, finished_at = NaiveBaseline(model, MonotonicClock()).generate(PROMPTS, 3)
    assert shapes == [(1, 3), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 5), (1, 1), (1, 1)]
    assert finished_at == sorted(finished_at)


def test_an_output_that_is_too_short_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "generate", lambda token_ids, **options: token_ids)
    with pytest.raises(LlmkitError, match="stopped before 4 tokens"):
        NaiveBaseline(model, MonotonicClock()).generate(PROMPTS, 4)


def test_it_says_what_it_is(model: Any) -> None:
    facts = NaiveBaseline(model, MonotonicClock()).describe()
    assert facts == {"naive_dtype": "float64", "naive_device": "cpu", "naive_attention": "sdpa"}
