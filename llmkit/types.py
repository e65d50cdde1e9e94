"""The vocabulary every room speaks: requests, sampling parameters, step plans and outputs.

Torch-free. Nothing here decides anything; the state machine lives in `llmkit.engine.planner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple

from llmkit.rows import DecodeRows as DecodeRows
from llmkit.rows import ScheduledRequest as ScheduledRequest
from llmkit.sampling_params import SamplingParams as SamplingParams


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


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the engine. Owned by the core; schedulers see a `RequestView` of it.

    Lengths that must not be confused: `num_tokens` known to the host; `num_computed_tokens` with valid KV;
    `num_in_flight_tokens` launched but not landed; `num_pending_samples` sampled but unread (their ids are on the
    device only). The next position to run is `num_computed_tokens + num_in_flight_tokens`. Of `num_blocks` entries of
    its block table the first `num_released_blocks` are held no more. `num_ready_tokens` had KV when it last started.
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
    num_ready_tokens: int = 0
    num_blocks: int = 0
    num_sent_blocks: int = 0
    num_released_blocks: int = 0
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


Edits = tuple[BlockTableEdit, ...]


class BlockCopy(NamedTuple):
    """Copy the KV of the first `num_tokens` slots of block `source` to `block`, over all layers."""

    source: int
    block: int
    num_tokens: int


class BlockCopies(NamedTuple):
    """Copies within the KV pool, and between it and host memory, before the step's rows run.

    First `saves`, (block of the pool, block of the host), then `forks`, all read before any is written, then
    `restores`, (block of the host, block of the pool). `more_forks` are the `forks` of further groups of layers, each
    within the group's own pool; empty if nobody is forked.
    """

    saves: tuple[tuple[int, int], ...] = ()
    restores: tuple[tuple[int, int], ...] = ()
    forks: tuple[BlockCopy, ...] = ()
    more_forks: tuple[tuple[BlockCopy, ...], ...] = ()


@dataclass(slots=True)
class StepPlan:
    """What one step runs: plain data, so that it can be recorded, replayed or sent to another process.

    Nobody changes it; it is not frozen because every step makes one, and a frozen one takes three times as long.
    `scheduled` is a `DecodeRows` where the rows of the step before go on, one token each, else a tuple.
    `copies` come before everything else. `more_edits` are those of further groups of layers, which have block tables
    of their own, or empty if no table changes; `of_group` is the plan as a group sees it.
    """

    step_id: int
    scheduled: Sequence[ScheduledRequest]
    admissions: tuple[Admission, ...] = ()
    edits: Edits = ()
    copies: BlockCopies | None = None
    more_edits: tuple[Edits, ...] = ()

    def of_group(self, number: int) -> StepPlan:
        """The same step with the edits and the copies of group `number`, 0 for the first."""
        if not number:
            return self
        edits = self.more_edits[number - 1] if self.more_edits else ()
        forks = self.copies.more_forks if self.copies is not None else ()
        copies = BlockCopies(forks=forks[number - 1]) if forks else None
        return StepPlan(self.step_id, self.scheduled, self.admissions, edits, copies)

    @property
    def num_tokens(self) -> int:
        if type(self.scheduled) is DecodeRows:
            return len(self.scheduled)
        return sum([row.num_tokens for row in self.scheduled])


class TokenLogprobs(NamedTuple):
    """Log-probability (nats) and rank (1 = most likely) of a token, and the most likely alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class StepResult:
    """Per scheduled row, in plan order: the sampled token, or -1 where the row did not sample. Nobody changes it.

    `more_token_ids`: by row, the tokens behind it where the executor found several at once (speculative decoding); see
    `Executor`.
    `device_seconds`: how long the device worked on this step and on earlier ones not reported yet; None if unknown.
    """

    step_id: int
    token_ids: Sequence[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    device_seconds: float | None = None
    more_token_ids: dict[int, tuple[int, ...]] = field(default_factory=dict)


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
