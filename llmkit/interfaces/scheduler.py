"""The contract of a scheduler: which requests run in this step, and how many tokens of each.

Torch-free; no clock and no random numbers of its own. A scheduler acts only through `SchedulingStep`, whose grants
reserve KV memory or change nothing, so a wrong choice can be slow but never corrupt memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, overload

from pydantic import Field

from llmkit.interfaces.settings import Settings
from llmkit.types import Request, RequestStatus


class DenialReason(Enum):
    """Why `SchedulingStep.run` granted nothing, or, for `TOO_LATE`, why a scheduler refuses a request."""

    NO_BLOCKS = "the cache has not enough free blocks"
    NO_TOKENS = "the step's token budget is spent"
    NO_SEQS = "max_num_seqs sequences are running"
    NEVER_FITS = "even an empty cache could not hold it"
    TOO_LATE = "it would end after its deadline"
    NO_WORK = "everything it knows is computed or in flight"


class Grant(NamedTuple):
    """`num_tokens` tokens of the request run in this step; their KV blocks are reserved."""

    num_tokens: int


class Denied(NamedTuple):
    """Nothing was granted and nothing changed."""

    reason: DenialReason


grant = cache(Grant)
"""Interned grants: one object per size."""


class RequestView:
    """What a scheduler may know of a request: lengths and service, never token ids or block numbers. Read-only."""

    __slots__ = ("_match", "_request")

    def __init__(self, request: Request, match: Callable[[Request], int] = lambda request: 0) -> None:
        self._request = request
        self._match = match

    def __repr__(self) -> str:
        return f"RequestView({self.request_id!r}, {self.status.value}, {self.num_computed_tokens}/{self.num_tokens})"

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def status(self) -> RequestStatus:
        return self._request.status

    @property
    def arrival_time(self) -> float:
        """Scheduled arrival, seconds on the engine's clock."""
        return self._request.arrival_time

    @property
    def priority(self) -> int:
        """Lower runs first."""
        return self._request.priority

    @property
    def tenant(self) -> str:
        return self._request.tenant

    @property
    def deadline(self) -> float | None:
        """When the last token is wanted, seconds on the engine's clock."""
        return self._request.deadline

    @property
    def length_hint(self) -> int | None:
        """The caller's guess of the number of output tokens."""
        return self._request.length_hint

    @property
    def num_prompt_tokens(self) -> int:
        return self._request.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return self._request.num_output_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return self._request.num_tokens

    @property
    def max_num_tokens(self) -> int:
        """Prompt tokens plus the most output tokens it may get."""
        return self._request.max_num_tokens

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is valid."""
        return self._request.num_computed_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Leading tokens that it would find in the cache if it started now; 0 while it runs. Looked up when asked."""
        return 0 if self._request.status is RequestStatus.RUNNING else self._match(self._request)

    @property
    def num_in_flight_tokens(self) -> int:
        """Tokens launched in steps whose results have not landed."""
        return self._request.num_in_flight_tokens

    @property
    def num_runnable_tokens(self) -> int:
        """Tokens that could run in this step: known or sampled, not yet computed or in flight."""
        request = self._request
        scheduled = request.num_computed_tokens + request.num_in_flight_tokens
        return request.num_tokens + request.num_pending_samples - scheduled

    @property
    def num_service_tokens(self) -> int:
        """Tokens computed for it so far, recomputation included."""
        return self._request.num_service_tokens

    @property
    def num_blocks(self) -> int:
        """KV blocks it holds."""
        return self._request.num_blocks - self._request.num_released_blocks

    @property
    def num_preemptions(self) -> int:
        return self._request.num_preemptions


class RequestList(Sequence[RequestView]):
    """A read-only, live sequence of requests. It does not change while `schedule` runs."""

    __slots__ = ("_views",)

    def __init__(self, views: list[RequestView]) -> None:
        self._views = views

    def __len__(self) -> int:
        return len(self._views)

    def __iter__(self) -> Iterator[RequestView]:
        return iter(self._views)

    @overload
    def __getitem__(self, index: int) -> RequestView: ...

    @overload
    def __getitem__(self, index: slice) -> list[RequestView]: ...

    def __getitem__(self, index: int | slice) -> RequestView | list[RequestView]:
        return self._views[index]


class RequestQueue(NamedTuple):
    """Who wants to run. `waiting`: preempted ones first, then by arrival. `running`: by admission."""

    waiting: Sequence[RequestView]
    running: Sequence[RequestView]


class SchedulingStep(Protocol):
    """One step being planned. The only way a scheduler can act, and safe to call in any order."""

    @property
    def now(self) -> float:
        """Seconds on the engine's clock."""
        ...

    @property
    def num_free_tokens(self) -> int:
        """What is left of `max_num_batched_tokens`."""
        ...

    @property
    def num_free_seqs(self) -> int:
        """What is left of `max_num_seqs`."""
        ...

    @property
    def num_free_blocks(self) -> int:
        """KV blocks nobody owns."""
        ...

    @property
    def num_reclaiming_blocks(self) -> int:
        """Blocks given up but still named by a step in flight; free once it lands."""
        ...

    def num_missing_blocks(self, request: RequestView) -> int:
        """Blocks it would take, beyond those `request` holds or can reuse, to hold every token known of it."""
        ...

    def run(self, request: RequestView, max_tokens: int) -> Grant | Denied:
        """Run up to `max_tokens` tokens of `request` in this step, admitting it if it waits."""
        ...

    def preempt(self, request: RequestView) -> int:
        """Take a running request out; it will be recomputed. Returns the blocks that are free now."""
        ...

    def reject(self, request: RequestView, reason: str) -> None:
        """End a waiting request with an error."""
        ...


ON_CPU = {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
ON_GPU = {"max_num_seqs": 256, "max_num_batched_tokens": 16384}
"""Limits of those who give none."""
if TYPE_CHECKING:
    Limit = int
else:
    Limit = int | None  # null until the device is known, which no scheduler sees
BY_DEVICE: Any = None


class SchedulerSettings(Settings):
    """Limits every scheduler has; the core enforces them. A scheduler's own `settings` hold numbers."""

    max_num_seqs: Limit = Field(
        BY_DEVICE, ge=1, le=4096, description="most sequences running at once; null: 64 on a CPU, 256 on a GPU"
    )
    max_num_batched_tokens: Limit = Field(
        BY_DEVICE, ge=1, le=1 << 20, description="most tokens in one step; null: 2048 on a CPU, 16384 on a GPU"
    )

    def on(self, device: str) -> Self:
        """The same, with limits for a `device` of that type ("cpu", "cuda") where none are given."""
        limits = ON_CPU if device == "cpu" else ON_GPU
        return self.model_copy(update={name: limit for name, limit in limits.items() if getattr(self, name) is None})


class Scheduler(ABC):
    """Chooses. Subclass `llmkit.ContinuousBatching` for the usual case, this for full control."""

    Settings: ClassVar[type[SchedulerSettings]] = SchedulerSettings

    def __init__(self, settings: SchedulerSettings) -> None:
        self.settings = settings.on("cpu")

    @abstractmethod
    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        """Plan one step by calling `step.run`, `step.preempt` and `step.reject`."""

    def repeats(self, num_waiting: int, num_free_seqs: int) -> bool:
        """Whether to go on unasked: with `num_waiting` requests waiting, `schedule` would run every running request by
        its one next token, as the step before did, and do nothing else.

        The core asks this first, and only when every running request decodes and the token budget holds them all. If
        blocks run short `schedule` is called after all. Default: False, `schedule` is called for every step.
        """
        return False

    # What it promises of fairness. The engine does not ask; `llmkit.testing` does after every step of a walk.

    def may_pass(self, started: RequestView, waiting: RequestView, now: float) -> bool:
        """Whether a step at `now` may have started one of two waiting requests and left the other.

        A bound on how long somebody may be passed over belongs here. Default: True, nothing is promised.
        """
        return True

    def service(self, request: RequestView) -> float | None:
        """How much `request` has had of what tenants have equal shares of; it grows with what is computed.

        While two tenants both have requests left waiting, one may be ahead of the other by what the two had since they
        last started one, no more. Default: None, nobody has a share.
        """
        return None
