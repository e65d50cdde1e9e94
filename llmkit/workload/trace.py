"""Requests in a JSONL file, one object a line: read with errors that name file and line, and written back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmkit.errors import ConfigError, explain
from llmkit.workload.prompts import prompt_source
from llmkit.workload.protocol import ModelBounds
from llmkit.workload.requests import TimedRequest
from llmkit.workload.settings import MAX_LEN, TraceSettings

MAX_SECONDS = 1e9


class TraceRow(BaseModel):
    """One line. The prompt is given as token ids, as text, or as a length to draw."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    arrival_time: float = Field(default=0.0, ge=0.0, le=MAX_SECONDS)
    prompt_token_ids: list[int] | None = Field(default=None, max_length=MAX_LEN)
    prompt: str | None = None
    prompt_len: int | None = Field(default=None, ge=1, le=MAX_LEN)
    max_tokens: int = Field(ge=1, le=1 << 20)
    priority: int = Field(default=0, ge=-(1 << 31), lt=1 << 31)
    tenant: str = Field(default="", max_length=256)
    deadline: float | None = Field(default=None, ge=0.0, le=MAX_SECONDS)
    length_hint: int | None = Field(default=None, ge=1, le=MAX_LEN)

    @model_validator(mode="after")
    def _one_prompt(self) -> TraceRow:
        given = [name for name in ("prompt_token_ids", "prompt", "prompt_len") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prompt_token_ids, prompt, prompt_len (got {given or 'none'})")
        return self


def read_rows(settings: TraceSettings) -> list[tuple[str, TraceRow]]:
    """The trace's lines as (file:line, row), no model needed; ConfigError names the file and the line that is wrong."""
    if not settings.path:
        raise ConfigError("workload.path: name a JSONL file, one request a line")
    rows = list(islice(_rows(Path(settings.path)), settings.num_requests or None))
    if not rows:
        raise ConfigError(f"{settings.path}: the trace is empty")
    return rows


def timed_requests(
    rows: Iterable[tuple[str, TraceRow]], settings: TraceSettings, bounds: ModelBounds
) -> list[TimedRequest]:
    """The trace's requests in order of arrival; ConfigError names the line that is text when there is no tokenizer.

    A prompt that the model cannot take (empty, too long, unknown token id) is not an error here: the engine refuses
    that request and the others run.
    """
    draw = prompt_source("", bounds, np.random.default_rng(settings.seed))
    requests: list[TimedRequest] = []
    for where, row in rows:
        if row.prompt_token_ids is not None:
            prompt = tuple(row.prompt_token_ids)
        elif row.prompt is not None:
            if bounds.encode is None:
                raise ConfigError(f"{where}: the prompt is text, but the model has no tokenizer")
            prompt = tuple(bounds.encode(row.prompt))
        else:
            prompt = draw(row.prompt_len or 0)
        requests.append(_timed(row, prompt, settings.time_scale))
    return sorted(requests, key=lambda request: request.arrival_time)


def _timed(row: TraceRow, prompt: tuple[int, ...], scale: float) -> TimedRequest:
    deadline = None if row.deadline is None else row.deadline * scale
    arrival = row.arrival_time * scale
    return TimedRequest(arrival, prompt, row.max_tokens, row.priority, row.tenant, deadline, row.length_hint)


def _rows(path: Path) -> Iterator[tuple[str, TraceRow]]:
    """Non-empty lines as (file:line, row)."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"workload.path={str(path)!r} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path}:{number}", _parse(f"{path}:{number}", line)


def _parse(where: str, line: str) -> TraceRow:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a line is a JSON object, not {type(values).__name__}")
    try:
        return TraceRow.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(TraceRow, error)}") from None


def write_trace(path: Path, requests: Iterable[TimedRequest]) -> None:
    """Write requests so that `read_rows` gives them back; fields at their defaults are left out."""
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            values = asdict(request)
            values["prompt_token_ids"] = list(request.prompt_token_ids)
            row = TraceRow.model_validate(values)
            file.write(row.model_dump_json(exclude_defaults=True) + "\n")
