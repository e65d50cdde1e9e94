"""Fault containment, cell by cell: one exception at one call of one hook, beside 31 witnesses.

Whatever is raised, wherever: every request ends, witnesses have the very tokens of a run without it, no block or slot
is lost, and the engine serves on. Requests that a failed step ran with end in an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pluggy

from llmkit import hookspecs
from llmkit.engine.engine import Engine
from llmkit.engine.grouped_cache import groups_of
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.engine.swapping import HostPool, SwapCosts
from llmkit.errors import PluginError
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.clock import VirtualClock
from llmkit.interfaces.scheduler import Scheduler
from llmkit.testing import OracleExecutor, continuation
from llmkit.testing.grouped import GroupedOracle
from llmkit.testing.invariants import check_empty
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.types import Completion, FinishReason, Request, SamplingParams

NUM_WITNESSES = 31
FAULTY = "faulty"
EXCEPTIONS: tuple[type[BaseException], ...] = (
    ValueError, MemoryError, KeyboardInterrupt, RuntimeError, PluginError, OSError, StopIteration, SystemExit,
)  # fmt: skip
ANY_REQUEST = ("schedule", "schedule, at its end", "stats", "launch", "wait", "step_finished")
"""Hooks that are called for no request in particular."""
OWN_REQUEST = (
    "match", "num_missing_blocks", "allocate", "fork", "commit", "free", "block_table", "request_finished", "heed",
)  # fmt: skip
"""Hooks that raise when they are called for the faulty request."""
HOOKS = ANY_REQUEST + OWN_REQUEST
MOST_CALLS = {
    "match": 2, "num_missing_blocks": 1, "allocate": 3, "fork": 1, "commit": 4, "free": 1, "block_table": 4,
    "request_finished": 1, "heed": 3,
}  # fmt: skip
"""How often at least one in a few requests has them called; 12 for the others."""
STEP_SCOPED = ("launch", "wait")
"""What fails here fails for all rows of the step."""


@dataclass(frozen=True, slots=True)
class Cell:
    """`exception` is raised by the `call`-th call of `hook`; `seed` draws the requests."""

    hook: str
    call: int
    exception: type[BaseException]
    depth: int
    seed: int

    def __str__(self) -> str:
        return f"{self.exception.__name__} in call {self.call} of {self.hook}, depth {self.depth}, seed {self.seed}"


@dataclass(slots=True)
class Trap:
    """Raises once, at the given call."""

    cell: Cell
    num_calls: int = 0
    has_raised: bool = False
    error: BaseException = field(init=False)

    def __post_init__(self) -> None:
        self.error = self.cell.exception("on purpose")

    def spring(self) -> None:
        """One more call."""
        self.num_calls += 1
        if self.num_calls == self.cell.call:
            self.has_raised = True
            raise self.error

    def around(self, call: Callable[..., Any], concerns: Callable[..., bool]) -> Callable[..., Any]:
        """`call`, which first raises if it is time."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if concerns(*args, **kwargs):
                self.spring()
            return call(*args, **kwargs)

        return guarded


class Observer:
    """Hears every event."""

    @hookspecs.hookimpl
    def llmkit_step_finished(self, event: Any) -> None:
        """Nothing to do."""

    @hookspecs.hookimpl
    def llmkit_request_finished(self, event: Any) -> None:
        """Nothing to do."""


class _Waiting:
    """A launched step whose `wait` may raise, after it has run."""

    def __init__(self, pending: Any, trap: Trap) -> None:
        self._pending, self._trap, self._result = pending, trap, None

    def wait(self) -> Any:
        """The result, unless it is time; it may be asked for again."""
        if self._result is None:
            self._result = self._pending.wait()
        self._trap.spring()
        return self._result


def set_trap(engine: Engine, trap: Trap) -> None:
    """Put the trap around its hook."""
    hook, planner = trap.cell.hook, engine.planner
    if hook in ("match", "num_missing_blocks", "allocate", "fork", "commit", "free", "block_table", "stats"):
        own = hook != "stats"
        groups = groups_of(planner.allocator)
        allocator = groups[trap.cell.seed % len(groups) if hook == "fork" else 0]
        call = getattr(allocator, hook)
        setattr(allocator, hook, trap.around(call, lambda *args: not own or args[0].request_id == FAULTY))
    elif hook == "schedule":
        planner.scheduler.schedule = trap.around(planner.scheduler.schedule, lambda *args: True)  # type: ignore[method-assign]
    elif hook == "schedule, at its end":
        schedule = planner.scheduler.schedule

        def late(*args: Any) -> None:
            schedule(*args)
            trap.spring()

        planner.scheduler.schedule = late  # type: ignore[method-assign]
    elif hook == "launch":
        engine.executor.launch = trap.around(engine.executor.launch, lambda plan: True)  # type: ignore[method-assign]
    elif hook == "wait":
        launch = engine.executor.launch
        engine.executor.launch = lambda plan: _Waiting(launch(plan), trap)  # type: ignore[method-assign,assignment]
    elif hook == "heed":
        progress = engine._progress[FAULTY]
        progress.heed = trap.around(progress.heed, lambda *args: True)  # type: ignore[method-assign]
    else:
        _trap_observer(engine, trap)


def _trap_observer(engine: Engine, trap: Trap) -> None:
    name = f"llmkit_{trap.cell.hook}"

    class Trapped(Observer):
        pass

    def hear(self: Any, event: Any) -> None:
        if name == "llmkit_step_finished" or event.request_id == FAULTY:
            trap.spring()

    setattr(Trapped, name, hookspecs.hookimpl(hear))
    getattr(Trapped, name).__name__ = name
    manager = pluggy.PluginManager("llmkit")
    manager.add_hookspecs(hookspecs)
    manager.register(Trapped())
    engine.hooks = manager.hook


class SlotlessOracle(OracleExecutor):
    """Like its base, but its methods can be replaced one by one."""


class SlotlessGroups(GroupedOracle):
    """Like its base, but its methods can be replaced one by one."""


def build_engine(
    scheduler: type[Scheduler], cache: type[CacheAllocator], depth: int, num_host_blocks: int = 0
) -> Engine:
    """An engine whose pool is too small for all its requests at once; preempted ones wait on the host if they can."""
    spec = CacheSpec(40, 4)
    drawn = {"max_num_seqs": 12, "max_num_batched_tokens": 40, "max_chunk_tokens": 6}
    built, allocator = build_scheduler(scheduler, drawn, {}), build_cache(cache, spec, {})
    limits = EngineLimits(50, spec.num_slots, frozenset({7}))
    sizes = spec.block_size, built.settings.max_num_seqs, limits.max_model_len, limits.vocab_size
    oracles = [SlotlessOracle(*sizes, window=group.spec.window) for group in groups_of(allocator)]
    executor = SlotlessGroups(oracles) if len(oracles) > 1 else oracles[0]
    host = HostPool(num_host_blocks, spec.block_size, SwapCosts(1.0, 0.0, 0.0)) if num_host_blocks else None
    return Engine(Planner(built, allocator, host), executor, limits, VirtualClock(), depth=depth)


def draw_requests(seed: int) -> list[Request]:
    """31 witnesses, and the faulty one somewhere among them."""
    random = Random(seed)
    head = [random.randrange(50) for _ in range(6)]
    requests = []
    for number in range(NUM_WITNESSES + 1):
        prompt = head[: random.randint(0, 6)] + [random.randrange(50) for _ in range(random.randint(1, 8))]
        params = SamplingParams(max_tokens=random.randint(1, 12))
        requests.append(Request(str(number), prompt, params, priority=random.randint(0, 2), seed=number))
    requests[random.randrange(8)].request_id = FAULTY
    return requests


def make_sample(requests: list[Request]) -> None:
    """Make the faulty request one more sample of a prompt that comes first."""
    at = next(at for at, request in enumerate(requests) if request.request_id == FAULTY)
    first = Request("first", [*range(11)], SamplingParams(max_tokens=100, ignore_eos=True))
    requests[at] = Request(FAULTY, [*range(11)], requests[at].sampling_params, seed=at)
    requests.insert(0, first)


def run_cell(cell: Cell, scheduler: type[Scheduler], cache: type[CacheAllocator]) -> bool:
    """Whether the call came at all; AssertionError if the fault was not contained."""
    num_host_blocks = 0 if cell.seed % 2 else 25
    engine, trap = build_engine(scheduler, cache, cell.depth, num_host_blocks), Trap(cell)
    requests, is_fork = draw_requests(cell.seed), cell.hook == "fork"
    if is_fork:
        make_sample(requests)
    reach = engine.limits.vocab_size, engine.limits.eos_token_ids, engine.limits.max_model_len
    wanted = {request.request_id: continuation(request, *reach) for request in requests}
    for request in requests:
        engine.add(request, after="first" if is_fork and request.request_id == FAULTY else None)
    set_trap(engine, trap)
    completions = drain(engine, trap)
    assert completions.keys() == wanted.keys(), f"{cell}: {wanted.keys() - completions.keys()} never ended"
    for name, completion in completions.items():
        _check_completion(cell, name, completion, wanted[name])
    late = Request("late", [1, 2, 3], SamplingParams(max_tokens=5))
    expected = continuation(late, *reach)
    engine.add(late)
    served = drain(engine, trap)["late"]
    assert (list(served.token_ids), served.finish_reason) == expected, f"{cell}: the engine does not serve on"
    check_empty(engine.planner)
    engine.planner.allocator.check()
    return trap.has_raised


def drain(engine: Engine, trap: Trap) -> dict[str, Completion]:
    """Step to the end; the trap's exception may come up once, as if a caller had caught it and gone on."""
    completions: dict[str, Completion] = {}
    for _ in range(2000):
        if not engine.has_unfinished:
            return completions
        try:
            outputs = engine.step()
        except BaseException as error:
            assert _is_of(error, trap.error), f"{trap.cell}: {type(error).__name__}: {error}"
            continue
        completions |= {output.request_id: output.completion for output in outputs if output.completion}
        engine.clock.advance(1.0)  # type: ignore[attr-defined]
    raise AssertionError(f"{trap.cell}: no end after 2000 steps")


def _is_of(error: BaseException, planted: BaseException) -> bool:
    return error is planted or error.__cause__ is planted or error.__context__ is planted


def _check_completion(cell: Cell, name: str, completion: Completion, wanted: tuple[list[int], FinishReason]) -> None:
    got = list(completion.token_ids)
    if completion.finish_reason is not FinishReason.ERROR:
        assert (got, completion.finish_reason) == wanted, f"{cell}: {name} got {got, completion.finish_reason}"
        return
    assert name == FAULTY or cell.hook in STEP_SCOPED, f"{cell}: witness {name} failed: {completion.error}"
    assert got == wanted[0][: len(got)], f"{cell}: {name} got {got} before its error"
    assert completion.error, f"{cell}: {name} failed for no reason"


def draw_cells(seed: int, number: int) -> Iterator[Cell]:
    """`number` cells that go through hooks and exceptions in turn; calls and depths are drawn."""
    random = Random(seed)
    for index in range(number):
        hook = HOOKS[index % len(HOOKS)]
        exception = EXCEPTIONS[index // len(HOOKS) % len(EXCEPTIONS)]
        yield Cell(
            hook, random.randint(1, MOST_CALLS.get(hook, 12)), exception, random.randint(0, 2), random.randrange(1000)
        )
