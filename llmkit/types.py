"""The vocabulary every room speaks: requests, sampling parameters, step plans and outputs.

Torch-free. Nothing here decides anything; the state machine lives in `llmkit.engine.planner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmkit.errors import ConfigError, explain

from llmkit.rows import DecodeRows as DecodeRows
from llmkit.rows import ScheduledRequest as ScheduledRequest

MAX_LOGPROBS = 20
MAX_SAMPLES = 64


class RequestStatus(Enum):
    """Where a request stands. `PREEMPTED` waits like `WAITING` but has run before."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended: a stop token or string, its length limit, the caller, or a fault."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(BaseModel):
    """How to choose tokens for one request. Every field is bounded; ConfigError, one line, names what is wrong.

    `temperature=0` is greedy. `top_k=0`, `top_p=1` and `min_p=0` switch the filters off. Penalties follow
    the usual definitions (repetition: Keskar et al. 2019; presence and frequency: OpenAI's API).
    `seed=None` derives a seed from the engine's seed and the request's number, so runs repeat.
    `logprobs=k` returns the sampled token and the k most likely ones; `prompt_logprobs=k` the same for the prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # keywords stay typed

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError(explain(type(self), error)) from None

        __init__.__pydantic_base_init__ = True  # `model_validate` does without it and raises ValidationError

    n: int = Field(default=1, ge=1, le=MAX_SAMPLES, description="samples of one prompt")
    max_tokens: int = Field(default=16, ge=1, le=1 << 20, description="most output tokens")
    min_tokens: int = Field(
        default=0, ge=0, le=1 << 20, description="no stop, no end of text before so many output tokens"
    )
    temperature: float = Field(
        default=1.0, ge=0.0, le=100.0, description="0 is greedy; above 1 flattens, below 1 sharpens"
    )
    top_k: int = Field(default=0, ge=0, description="only the so many likeliest tokens; 0: all")
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="only the likeliest tokens that make up this probability"
    )
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="only tokens at least this likely, relative to the likeliest"
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0.0, le=10.0, description="logits of tokens seen are divided (if negative, multiplied) by it"
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="taken off the logit of every token in the output"
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2.0, le=2.0, description="taken off once for each time a token is in the output"
    )
    logit_bias: dict[int, float] = Field(
        default_factory=dict, max_length=1024, description="token id: what is added to its logit, -100 to 100"
    )
    allowed_token_ids: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="no other token may be chosen; null: any"
    )
    bad_token_ids: tuple[int, ...] = Field(default=(), description="tokens that may not be chosen")
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=1 << 63,
        description="seed of the noise; null: derived from engine.seed and the request's number",
    )
    stop: tuple[str, ...] = Field(
        default=(), max_length=16, description="texts that end the output and are not part of it"
    )
    stop_token_ids: tuple[int, ...] = Field(default=(), max_length=128, description="tokens that end the output")
    ignore_eos: bool = Field(default=False, description="go on after the end-of-text token")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="log-probabilities of the sampled and so many likeliest tokens; null: none",
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="the same for the prompt's tokens"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        if any(not s for s in self.stop):
            raise ValueError("stop strings must not be empty")
        if any(abs(bias) > 100 for bias in self.logit_bias.values()):
            raise ValueError("logit_bias values must lie in [-100, 100]")
        return self


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the engine. Owned by the core; schedulers see a `RequestView` of it.

    Lengths that must not be confused: `num_tokens` known to the host; `num_computed_tokens` with valid KV;
    `num_in_flight_tokens` launched but not landed; `num_pending_samples` sampled but unread (their ids are on the
    device only). The next position to run is `num_computed_tokens + num_in_flight_tokens`.
    Times are seconds on the engine's clock.
    """

    request_id: str
    token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float = 0.0
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    length_hint: int | None = None
    seed: int = 0
    max_num_tokens: int = 0
    num_prompt_tokens: int = field(init=False)
    num_tokens: int = field(init=False)
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_pending_samples: int = 0
    num_cached_tokens: int = 0
    num_blocks: int = 0
    num_sent_blocks: int = 0
    num_preemptions: int = 0
    num_lost_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_service_tokens: int = 0
    slot: int = -1
    epoch: int = 0
    last_step_id: int = -1
    finish_reason: FinishReason | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_tokens = len(self.token_ids)
        if not self.max_num_tokens:
            self.max_num_tokens = self.num_prompt_tokens + self.sampling_params.max_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens


class Admission(NamedTuple):
    """A sequence enters (or re-enters) `slot`: everything the device must know about it."""

    slot: int
    request_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling_params: SamplingParams
    seed: int


class BlockTableEdit(NamedTuple):
    """Write `blocks` into the block table of `slot` from index `start` on, before the step runs."""

    slot: int
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step runs: plain data, so that it can be recorded, replayed or sent to another process.

    `scheduled` is a `DecodeRows` where the rows of the step before go on, one token each, else a tuple.
    """

    step_id: int
    scheduled: Sequence[ScheduledRequest]
    admissions: tuple[Admission, ...] = ()
    edits: tuple[BlockTableEdit, ...] = ()

    @property
    def num_tokens(self) -> int:
        if isinstance(self.scheduled, DecodeRows):
            return len(self.scheduled)
        return sum(row.num_tokens for row in self.scheduled)


class TokenLogprobs(NamedTuple):
    """Log-probability (nats) and rank (1 = most likely) of a token, and the most likely alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per scheduled row, in plan order: the sampled token, or -1 where the row did not sample.

    `device_seconds`: how long the device worked on this step and on earlier ones not reported yet; None if unknown.
    """

    step_id: int
    token_ids: Sequence[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    device_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request in seconds on the engine's clock; `None` until they happened."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_recomputed_tokens: int = 0

    @property
    def ttft(self) -> float | None:
        """Scheduled arrival to first token, seconds."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def e2el(self) -> float | None:
        """Scheduled arrival to last token, seconds."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of a prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] | None
    metrics: RequestMetrics
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What `LLM.generate` returns for one prompt: its completions; the first one's fields are shortcuts."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.completions[0].logprobs

    @property
    def metrics(self) -> RequestMetrics:
        return self.completions[0].metrics

    @property
    def error(self) -> str | None:
        return self.completions[0].error
