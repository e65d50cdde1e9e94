"""What was seen of one request and of one step. All times are seconds on the engine's clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class RequestRecord:
    """One request from its scheduled arrival on; `token_times` has one entry per output token.

    `num_computed_tokens` is the highest position ever computed, `num_recomputed_tokens` counts those computed again,
    `num_cached_tokens` the prompt tokens that were in the cache when it first ran.
    """

    request_id: str
    arrival_time: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    num_recomputed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    first_scheduled_time: float | None = None
    finished_time: float | None = None
    token_times: list[float] = field(default_factory=list)

    @property
    def is_completed(self) -> bool:
        """Whether it ended by itself: neither failed nor aborted."""
        return self.finish_reason in ("stop", "length")

    @property
    def is_in_time(self) -> bool:
        """Whether it ended by itself, its last token not after its deadline if it has one."""
        ended_at = self.token_times[-1] if self.is_completed and self.token_times else None
        return ended_at is not None and (self.deadline is None or ended_at <= self.deadline)

    @property
    def ttft(self) -> float | None:
        """Scheduled arrival to first token."""
        return self.token_times[0] - self.arrival_time if self.token_times else None

    @property
    def e2el(self) -> float | None:
        """Scheduled arrival to last token."""
        return self.token_times[-1] - self.arrival_time if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None if there is only one."""
        if len(self.token_times) < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)

    @property
    def itl(self) -> Iterator[float]:
        """Every gap between two successive tokens."""
        return (after - before for before, after in pairwise(self.token_times))


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step; see `StepEvent`. `idle_before`: seconds slept for want of requests since the step before landed."""

    step_id: int
    planned_at: float
    launched_at: float
    landed_at: float
    finished_at: float
    idle_before: float
    num_rows: int
    num_tokens: int
    num_new_tokens: int
    num_recomputed_tokens: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_cached_blocks: int
    num_free_blocks: int
    num_reserved_slots: int
    num_unwritten_slots: int
    sent_at: float
    device_seconds: float | None = None
    num_saved_blocks: int = 0
    num_restored_blocks: int = 0
