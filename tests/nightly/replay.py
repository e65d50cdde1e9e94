"""Repeat a walk of the nightly tier by its seed: alone, then rule by rule in the state machine, where it fails alike.

python -m tests.nightly.replay continuous paged 1000017 --depth 1
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from llmkit.testing.machine import replay, walk_machine
from tests.nightly.volume import DEPTHS, Pair, cache_options, known, walk_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing is wrong, else 1; prints what is, and every rule on the way there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scheduler", choices=known().names("scheduler"))
    parser.add_argument("cache", choices=known().names("cache"))
    parser.add_argument("seed", type=int, help="as a failure names it")
    parser.add_argument("--depth", type=int, choices=DEPTHS, default=0)
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    scheduler, cache = Pair(options.scheduler, options.cache).load()
    walk = walk_of(scheduler, cache, options.seed, options.depth)
    try:
        walk.run()
    except AssertionError as error:
        print(*walk.trace, error, sep="\n")
    machine = walk_machine(scheduler, cache, options.depth, cache_options=cache_options(cache, options.seed))
    try:
        replay(machine, walk)
    except AssertionError as error:
        print(f"the state machine: {str(error).partition(chr(10))[0]}")
        return 1
    print(f"nothing is wrong after {walk.coverage.num_steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
