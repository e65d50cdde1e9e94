"""Every hook of llmkit: the one page a plugin author reads. Mark implementations with `@hookimpl`.

Registration hooks run once; event hooks run once per step or per request and cost about 2 us a call, so components
on the hot path are called directly and never through hooks.
"""

from __future__ import annotations

from dataclasses import dataclass

import pluggy

from llmkit.interfaces.attention import AttentionRequirements
from llmkit.interfaces.cache import CacheStats
from llmkit.registry import Registry
from llmkit.types import FinishReason, RequestMetrics, StepPlan

hookspec = pluggy.HookspecMarker("llmkit")
hookimpl = pluggy.HookimplMarker("llmkit")


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One step that has landed. Times are seconds on the engine's clock; `new_tokens` maps request id to count.

    `num_running`, `num_waiting`, `cache` and the slots stand as they were while it ran, before requests that it ended
    left. `num_reserved_slots`: KV slots in used blocks; `num_unwritten_slots`: those that no step has written yet.
    Of a model with several groups of layers these are the first one's, who sees furthest.
    `sent_at`: the launch had returned. `device_seconds`: see `StepResult`.
    """

    plan: StepPlan
    planned_at: float
    launched_at: float
    landed_at: float
    finished_at: float
    new_tokens: dict[str, int]
    num_running: int
    num_waiting: int
    cache: CacheStats
    num_reserved_slots: int = 0
    num_unwritten_slots: int = 0
    sent_at: float = 0.0
    device_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """One request that has ended."""

    request_id: str
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason
    error: str | None
    metrics: RequestMetrics
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None


@hookspec
def llmkit_register(registry: Registry) -> None:
    """Register components: `registry.add_scheduler("mine", MyScheduler)` and its siblings. Runs once, first."""


@hookspec(firstresult=True)
def llmkit_select_attention(requirements: AttentionRequirements) -> str | None:
    """Answer `attention=auto`: the name of a backend that suits `requirements`, or None to pass."""


@hookspec
def llmkit_step_finished(event: StepEvent) -> None:
    """A step's results have been taken in."""


@hookspec
def llmkit_request_finished(event: RequestEvent) -> None:
    """A request ended, for whatever reason."""
