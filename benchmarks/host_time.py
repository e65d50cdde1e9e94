"""Host time of `Engine.step` around an executor that does nothing: steady decode, one step ahead, by phase.

python benchmarks/host_time.py                      # the table: rows of the batch against microseconds a step
python benchmarks/host_time.py --rows 256 --profile # where it goes

`plan` is the scheduler and the planner, `land` taking in the step before; what the executor itself does is not in it.
`streamed` is a step whose every token is reported at once, as `LLM.stream` wants it and `LLM.generate` does not.
`ending` is a whole batch from first prompt to last token with lengths of its own for every request, as in `nano256`:
requests end all the time, and everything, admission included, counts (as processor time), over the number of steps.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.engine.progress import Progress
from llmkit.interfaces.cache import CacheSpec
from llmkit.types import Request, SamplingParams, StepPlan, StepResult
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous

ROWS = (1, 64, 256, 1024)
MAX_MODEL_LEN, VOCAB_SIZE = 4096, 32_000
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@dataclass
class Done:
    """A step that has already run."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class Instant:
    """Takes no time: every row gets token 1."""

    def launch(self, plan: StepPlan) -> Done:
        return Done(StepResult(plan.step_id, [1] * len(plan.scheduled)))


@dataclass
class Stopwatch:
    """Seconds of every call of a function."""

    function: Callable[..., Any]
    seconds: list[float] = field(default_factory=list)

    def __call__(self, *arguments: Any) -> Any:
        started = perf_counter()
        answer = self.function(*arguments)
        self.seconds.append(perf_counter() - started)
        return answer


def build(num_rows: int, block_size: int) -> Engine:
    """An engine with room for all."""
    settings = Continuous.Settings(max_num_seqs=num_rows, max_num_batched_tokens=1 << 20)
    spec = CacheSpec(num_rows * MAX_MODEL_LEN // block_size, block_size)
    planner = Planner(Continuous(settings), PagedCache(PagedCache.Settings(), spec))
    return Engine(planner, Instant(), EngineLimits(VOCAB_SIZE, MAX_MODEL_LEN, frozenset({2})), depth=1)


def add(engine: Engine, num_rows: int, max_tokens: Callable[[], int], streams: bool = False) -> None:
    """Queue prompts of different lengths, so that blocks fill up at different steps."""
    for number in range(num_rows):
        params = SamplingParams(max_tokens=max_tokens(), **GREEDY)
        request = Request(str(number), [1] * (100 + 37 * number % 97), params)
        engine.add(request, Progress(request, engine.limits.eos_token_ids, streams=streams))


def steady(
    num_rows: int, block_size: int, num_steps: int, streams: bool = False, profile: cProfile.Profile | None = None
) -> list[float]:
    """Median microseconds of a decode step: in all, to plan it, to launch it, to land it."""
    engine = build(num_rows, block_size)
    add(engine, num_rows, lambda: MAX_MODEL_LEN, streams)
    for _ in range(20):
        engine.step()
    if profile is not None:
        profile.enable()
    plan = engine.planner.plan = Stopwatch(engine.planner.plan)  # type: ignore[method-assign]
    launch = engine.executor.launch = Stopwatch(engine.executor.launch)  # type: ignore[method-assign]
    step = Stopwatch(engine.step)
    for _ in range(num_steps):
        step()
    if profile is not None:
        profile.disable()
    rest = [all_ - planned - ran for all_, planned, ran in zip(step.seconds, plan.seconds, launch.seconds, strict=True)]
    return [statistics.median(seconds) * 1e6 for seconds in (step.seconds, plan.seconds, launch.seconds, rest)]


def ending(num_rows: int, block_size: int) -> float:
    """Mean microseconds of a step while requests of 100 to 1024 tokens end one after the other."""
    engine, lengths = build(num_rows, block_size), random.Random(0)
    add(engine, num_rows, lambda: lengths.randint(100, 1024))
    num_steps, started = 0, process_time()
    while engine.has_unfinished:
        engine.step()
        num_steps += 1
    return (process_time() - started) / num_steps * 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profile", action="store_true", help="print what takes longest")
    options = parser.parse_args(arguments)
    profile = cProfile.Profile() if options.profile else None
    print("| rows | us a step | plan | launch | land | streamed | ending |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for num_rows in options.rows:
        figures = steady(num_rows, options.block_size, options.steps, profile=profile)
        streamed, *_ = steady(num_rows, options.block_size, options.steps, streams=True)
        rest = streamed, ending(num_rows, options.block_size)
        numbers = " | ".join(f"{figure:.1f}" for figure in (*figures, *rest))
        print(f"| {num_rows} | {numbers} |", flush=True)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
