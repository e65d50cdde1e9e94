"""JSONL traces: read, written back, and every mistake told with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmkit.errors import ConfigError
from llmkit.workload.protocol import ModelBounds
from llmkit.workload.requests import TimedRequest
from llmkit.workload.settings import TraceSettings
from llmkit.workload.trace import read_rows, timed_requests, write_trace

BOUNDS = ModelBounds(vocab_size=300, max_model_len=64, encode=lambda text: list(text.encode()))

requests = st.builds(
    TimedRequest,
    arrival_time=st.floats(0, 1e6),
    prompt_token_ids=st.lists(st.integers(-5, 10_000), max_size=5).map(tuple),
    max_tokens=st.integers(1, 1000),
    priority=st.integers(-9, 9),
    tenant=st.text(max_size=5),
    deadline=st.none() | st.floats(0, 1e6),
    length_hint=st.none() | st.integers(1, 1000),
)


def read_trace(settings: TraceSettings, bounds: ModelBounds) -> list[TimedRequest]:
    return timed_requests(read_rows(settings), settings, bounds)


def write(path: Path, *lines: object) -> TraceSettings:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return TraceSettings(path=str(path))


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(requests, min_size=1, max_size=5))
def test_what_was_written_is_read_back(tmp_path: Path, given_requests: list[TimedRequest]) -> None:
    path = tmp_path / "trace.jsonl"
    write_trace(path, given_requests)
    expected = sorted(given_requests, key=lambda request: request.arrival_time)
    assert read_trace(TraceSettings(path=str(path)), BOUNDS) == expected


def test_three_ways_to_give_a_prompt(tmp_path: Path) -> None:
    settings = write(
        tmp_path / "t.jsonl",
        {"prompt_token_ids": [1, 2], "max_tokens": 3},
        "",
        {"prompt": "hi", "max_tokens": 1, "arrival_time": 2},
        {"prompt_len": 7, "max_tokens": 1, "arrival_time": 3, "tenant": "t", "priority": -1},
    )
    ids, text, drawn = read_trace(settings, BOUNDS)
    assert ids == TimedRequest(0.0, (1, 2), 3)
    assert text == TimedRequest(2.0, (104, 105), 1)
    assert (len(drawn.prompt_token_ids), drawn.tenant, drawn.priority) == (7, "t", -1)
    assert all(0 <= token < 300 for token in drawn.prompt_token_ids)
    assert read_trace(settings, BOUNDS)[2] == drawn


def test_scale_and_limit(tmp_path: Path) -> None:
    row = {"prompt_len": 1, "max_tokens": 1}
    settings = write(
        tmp_path / "t.jsonl", *({**row, "arrival_time": t, "deadline": t + 1} for t in (4, 1, 2)), "not JSON"
    )
    settings = settings.model_copy(update={"num_requests": 3, "time_scale": 0.5})
    read = read_trace(settings, BOUNDS)
    assert [(request.arrival_time, request.deadline) for request in read] == [(0.5, 1.0), (1.0, 1.5), (2.0, 2.5)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "a line is a JSON object, not list"),
        ({"max_tokens": 1}, "exactly one of"),
        ({"max_tokens": 1, "prompt": "a", "prompt_len": 2}, "exactly one of"),
        ({"prompt_len": 1}, "max_tokens: a value is required"),
        ({"prompt_len": 1, "max_tokens": 0}, "max_tokens=0: Input should be greater than or equal to 1"),
        ({"prompt_len": 1, "max_tokens": "5"}, "max_tokens='5': Input should be a valid integer"),
        ({"prompt_len": 1, "max_tokens": 1, "arrival_time": -1}, "arrival_time"),
        ('{"prompt_len": 1, "max_tokens": 1, "arrival_time": NaN}', "arrival_time"),
        ({"prompt_len": 1, "max_tokens": 1, "temprature": 0}, "temprature: no such option (options: arrival_time"),
        ({"prompt_len": 1, "max_tokens": 1, "priorty": 0}, "priorty: no such option; did you mean 'priority'?"),
        ({"prompt_token_ids": [1, "a"], "max_tokens": 1}, "prompt_token_ids.1"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, problem: str) -> None:
    settings = write(tmp_path / "t.jsonl", {"prompt_len": 1, "max_tokens": 1}, "", line)
    with pytest.raises(ConfigError, match=re.escape("t.jsonl:3: ") + ".*" + re.escape(problem)) as caught:
        read_trace(settings, BOUNDS)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a JSONL file"):
        read_trace(TraceSettings(), BOUNDS)
    with pytest.raises(ConfigError, match=r"missing\.jsonl' cannot be read"):
        read_trace(TraceSettings(path=str(tmp_path / "missing.jsonl")), BOUNDS)
    with pytest.raises(ConfigError, match="is empty"):
        read_trace(write(tmp_path / "t.jsonl", ""), BOUNDS)
    with pytest.raises(ConfigError, match=r"t\.jsonl:1: the prompt is text"):
        read_trace(write(tmp_path / "t.jsonl", {"prompt": "a", "max_tokens": 1}), ModelBounds(9, 9))
