"""The nightly tier: much of everything that is too long for the default suite; writes `docs/reliability.md` itself.

python -m tests.nightly.run                                   # ten million steps: an hour of one core, less of several
python -m tests.nightly.run --steps 200000 --rules 500 --cells 300 --no-slow
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from xml.etree import ElementTree

from tests.nightly.page import Circumstances, Suite, write_page
from tests.nightly.volume import Budget, Tally, all_pairs, run_pair

ROOT = Path(__file__).resolve().parents[2]


def run_pairs(budget: Budget, workers: int) -> list[Tally]:
    """Every pair, `workers` at a time; one line to stderr for each."""
    jobs = [(pair, budget) for pair in all_pairs()]
    tallies = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for tally in pool.map(run_pair, jobs):
            tallies.append(tally)
            done = f"{tally.coverage.num_steps:,} steps, {tally.num_rules:,} rules, {tally.num_cells} cells"
            print(f"{tally.pair}: {done}, {len(tally.failures)} failures", file=sys.stderr)
    return tallies


def run_suite(expression: str) -> Suite:
    """The tests that a marker expression selects, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", expression, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        return read_suite(report)


def read_suite(report: Path) -> Suite:
    """Count the cases of a JUnit file; a test that failed or broke is named."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return Suite(len(cases), tuple(f"{case.get('classname')}: {case.get('name')}" for case in failed))


def commit() -> str:
    """The commit of this tree, and whether something was changed since."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return (head.stdout.strip() or "unknown") + (" with changes" if dirty.stdout.strip() else "")


def without_page(arguments: Sequence[str]) -> list[str]:
    """Options that say what was done, not where it was written."""
    at = arguments.index("--page") if "--page" in arguments else len(arguments)
    return [*arguments[:at], *arguments[at + 2 :]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if anything failed or survived; the page is written in any case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000_000, help="checked steps of walks, over all pairs")
    parser.add_argument("--rules", type=int, default=100_000, help="hypothesis rules for each pair")
    parser.add_argument("--cells", type=int, default=2400, help="fault cells, over all pairs")
    parser.add_argument("--seed", type=int, default=1_000_000, help="first seed; the default suite's are below 2000")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--no-mutants", action="store_true", help="leave the seeded mutants out")
    parser.add_argument("--no-slow", action="store_true", help="leave the tests marked slow out")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reliability.md", help="where to write")
    options = parser.parse_args(arguments)
    started, before = time.perf_counter(), commit()
    share = len(all_pairs())
    budget = Budget(-(-options.steps // share), options.rules, -(-options.cells // share), options.seed)
    tallies = run_pairs(budget, options.workers)
    mutants = None if options.no_mutants else run_suite("mutant")
    slow = None if options.no_slow else run_suite("slow and not cuda")
    command = " ".join(["python -m tests.nightly.run", *without_page(sys.argv[1:] if arguments is None else arguments)])
    where = Circumstances(before, platform.python_version(), command, time.perf_counter() - started)
    options.page.write_text(write_page(tallies, budget, mutants, slow, where), encoding="utf-8")
    print(f"written: {options.page.name}")
    wrong = [tally for tally in tallies if tally.failures] + [one for one in (mutants, slow) if one and one.failed]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
