"""How many checked steps a second the walks make: on one core, and with a process on each.

python -m tests.nightly.rate
python -m tests.nightly.rate --steps 2000 --processes 4
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from llmkit.testing.coverage import Coverage
from tests.nightly.volume import Budget, Pair, Tally, all_pairs, walk_pair


@dataclass(frozen=True, slots=True)
class Round:
    """The walks of every pair, one after the other in one process: what each did, and wall clock seconds in all."""

    tallies: list[Tally]
    seconds: float

    @property
    def coverage(self) -> Coverage:
        return sum([tally.coverage for tally in self.tallies], Coverage())


def walk_round(budget: Budget, pairs: Sequence[Pair]) -> Round:
    """Walk through all `pairs`; for a process of its own."""
    logging.disable(logging.CRITICAL)  # what is contained is logged with its traceback
    tallies, started = [Tally(pair) for pair in pairs], time.perf_counter()
    for tally in tallies:
        walk_pair(tally, *tally.pair.load(), budget)
    return Round(tallies, time.perf_counter() - started)


def side_by_side(budget: Budget, pairs: Sequence[Pair], processes: int) -> list[Round]:
    """A round in each of so many processes, all of them at once."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(walk_round, budget, pairs) for _ in range(processes)]]


def show(what: str, counted: Sequence[tuple[Coverage, float]]) -> str:
    """Rates of all that goes on at once add up: counts, and the seconds they took."""
    steps, rules = (sum([getattr(count, name) / s for count, s in counted]) for name in ("num_steps", "num_rules"))
    return f"{what}: {steps:,.0f} steps/s, {rules:,.0f} operations/s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a walk has failed. Operations are steps and all other rules, each with its checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="checked steps of each pair")
    parser.add_argument("--seed", type=int, default=1_000_000, help="first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes side by side")
    options = parser.parse_args(arguments)
    budget, pairs = Budget(options.steps, 0, 0, options.seed), all_pairs()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    (alone,) = side_by_side(budget, pairs, 1)
    for tally in alone.tallies:
        print(show(str(tally.pair), [(tally.coverage, tally.step_seconds)]))
    print(show("one core, all pairs", [(alone.coverage, sum([tally.step_seconds for tally in alone.tallies]))]))
    beside = side_by_side(budget, pairs, options.processes)
    rates = [(one.coverage, one.seconds) for one in beside]
    print(show(f"{options.processes} processes side by side, wall clock", rates))
    failures = [failure for one in (alone, *beside) for tally in one.tallies for failure in tally.failures]
    for failure in failures:
        print(failure)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
