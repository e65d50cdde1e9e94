"""llmkit: an LLM inference engine built from parts you can replace.

This is the whole vocabulary of users and plugin authors: import from here, or from `llmkit.interfaces`.
Importing it never imports torch; `LLM` and `Engine` are loaded when first used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from llmkit.batching import ContinuousBatching, ContinuousBatchingSettings
from llmkit.engine.settings import EngineSettings
from llmkit.errors import CapacityError, ConfigError, LlmkitError, ModelError, PluginError, RequestError
from llmkit.hookspecs import RequestEvent, StepEvent, hookimpl
from llmkit.interfaces.attention import AttentionBackend, AttentionBatch, AttentionRequirements, LayerSpec
from llmkit.interfaces.cache import CacheAllocator, CacheSpec, CacheStats
from llmkit.interfaces.clock import Clock, MonotonicClock, VirtualClock
from llmkit.interfaces.eviction import Evictable, EvictionPolicy
from llmkit.interfaces.executor import Executor, PendingStep
from llmkit.interfaces.scheduler import (
    DenialReason,
    Denied,
    Grant,
    RequestQueue,
    RequestView,
    Scheduler,
    SchedulerSettings,
    SchedulingStep,
)
from llmkit.interfaces.settings import Settings
from llmkit.registry import Component, Registry
from llmkit.types import (
    BlockCopy,
    Completion,
    FinishReason,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestStatus,
    SamplingParams,
    ScheduledRequest,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from llmkit.config import RunConfig
    from llmkit.engine.engine import Engine
    from llmkit.llm import LLM
    from llmkit.plugins import load_plugins

__all__ = [
    "LLM",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionRequirements",
    "BlockCopy",
    "CacheAllocator",
    "CacheSpec",
    "CacheStats",
    "CapacityError",
    "Clock",
    "Completion",
    "Component",
    "ConfigError",
    "ContinuousBatching",
    "ContinuousBatchingSettings",
    "DenialReason",
    "Denied",
    "Engine",
    "EngineSettings",
    "Evictable",
    "EvictionPolicy",
    "Executor",
    "FinishReason",
    "Grant",
    "LayerSpec",
    "LlmkitError",
    "ModelError",
    "MonotonicClock",
    "PendingStep",
    "PluginError",
    "Registry",
    "Request",
    "RequestError",
    "RequestEvent",
    "RequestMetrics",
    "RequestOutput",
    "RequestQueue",
    "RequestStatus",
    "RequestView",
    "RunConfig",
    "SamplingParams",
    "ScheduledRequest",
    "Scheduler",
    "SchedulerSettings",
    "SchedulingStep",
    "Settings",
    "StepEvent",
    "StepPlan",
    "StepResult",
    "TokenLogprobs",
    "VirtualClock",
    "hookimpl",
    "load_plugins",
]

_LAZY = {
    "LLM": "llmkit.llm",
    "Engine": "llmkit.engine.engine",
    "RunConfig": "llmkit.config",
    "load_plugins": "llmkit.plugins",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'llmkit' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
