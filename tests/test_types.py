"""Bounds of sampling parameters, and the lengths of a request."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmkit.errors import ConfigError
from llmkit.types import (
    Completion,
    FinishReason,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestStatus,
    SamplingParams,
    ScheduledRequest,
    StepPlan,
)

BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 64], [0, 65]),
    "max_tokens": ([1, 1 << 20], [0, -1, (1 << 20) + 1]),
    "min_tokens": ([0, 16], [-1, 17]),
    "temperature": ([0.0, 100.0], [-0.1, 100.1, float("nan"), float("inf")]),
    "top_k": ([0, 50], [-1]),
    "top_p": ([0.01, 1.0], [0.0, 1.01, float("nan")]),
    "min_p": ([0.0, 1.0], [-0.1, 1.1]),
    "repetition_penalty": ([0.1, 10.0], [0.0, 10.1, float("nan")]),
    "presence_penalty": ([-2.0, 2.0], [-2.1, 2.1]),
    "frequency_penalty": ([-2.0, 2.0], [-2.1, 2.1]),
    "logit_bias": (
        [{}, {5: 100.0, 6: -100}],
        [{5: 100.1}, {5: -101.0}, {5: float("nan")}, dict.fromkeys(range(1025), 0.0)],
    ),
    "allowed_token_ids": ([None, (1,)], [()]),
    "seed": ([None, 0, (1 << 63) - 1], [-1, 1 << 63]),
    "stop": ([(), "one", ("a", "b")], ["", ("a", ""), ("x",) * 17]),
    "stop_token_ids": ([(), (1, 2)], [(1,) * 129]),
    "logprobs": ([None, 0, 20], [-1, 21]),
    "prompt_logprobs": ([None, 0, 20], [-1, 21]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (good, _) in BOUNDS.items() for value in good])
def test_values_within_bounds_are_taken(name: str, value: Any) -> None:
    expected = (value,) if name == "stop" and isinstance(value, str) else value
    assert getattr(SamplingParams(**{name: value}), name) == expected


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, bad) in BOUNDS.items() for value in bad])
def test_values_beyond_bounds_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or name.replace("_", " ") in str(caught.value)


def test_a_wrong_value_is_one_line_with_field_value_and_range() -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(max_tokens=0, top_p=2.0)
    first, second = str(caught.value).split("; ")
    assert first == "max_tokens=0: Input should be greater than or equal to 1 (allowed: integer, 1 to 1048576)"
    assert second == "top_p=2.0: Input should be less than or equal to 1 (allowed: number, above 0.0, at most 1.0)"
    with pytest.raises(ValidationError):
        SamplingParams.model_validate({"max_tokens": 0})
    assert SamplingParams.model_validate({"max_tokens": 3}) == SamplingParams(max_tokens=3)


def test_every_parameter_is_described() -> None:
    assert all(field.description for field in SamplingParams.model_fields.values())


def test_unknown_parameters_are_refused_and_known_ones_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match="temprature: no such option; did you mean 'temperature'"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


def test_at_least_cannot_exceed_at_most() -> None:
    with pytest.raises(ConfigError, match=r"^min_tokens=9 is above max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)


@given(st.integers(1, 100), st.integers(1, 100))
def test_a_request_knows_its_lengths(num_prompt: int, max_tokens: int) -> None:
    request = Request("a", [1] * num_prompt, SamplingParams(max_tokens=max_tokens))
    assert (request.num_prompt_tokens, request.num_tokens, request.num_output_tokens) == (num_prompt, num_prompt, 0)
    assert request.max_num_tokens == num_prompt + max_tokens and request.status is RequestStatus.WAITING
    request.token_ids += [2, 3]
    request.num_tokens += 2
    assert request.output_token_ids == [2, 3] and request.num_output_tokens == 2


def test_requests_are_compared_by_identity() -> None:
    one, two = (Request("a", [1], SamplingParams()) for _ in range(2))
    assert one != two and len({one, two}) == 2


def test_a_plan_counts_its_tokens() -> None:
    rows = (ScheduledRequest("a", 0, 0, 5, False, 1), ScheduledRequest("b", 1, 7, 1, True, 2))
    assert StepPlan(0, rows).num_tokens == 6


def test_an_output_passes_on_its_first_completion() -> None:
    metrics = RequestMetrics(1.0, 1.5, 3.0)
    first = Completion(0, "x", (1, 2), FinishReason.STOP, None, metrics, "why")
    second = Completion(1, "y", (3,), FinishReason.LENGTH, None, RequestMetrics(1.0))
    output = RequestOutput("p", (9,), (first, second))
    seen = output.text, output.token_ids, output.finish_reason, output.logprobs, output.metrics, output.error
    assert seen == ("x", (1, 2), FinishReason.STOP, None, metrics, "why")
    assert (metrics.ttft, metrics.e2el, second.metrics.ttft, second.metrics.e2el) == (0.5, 2.0, None, None)
    assert FinishReason.STOP == "stop"
