"""The nightly tier: much of everything that is too long for the default suite; writes `docs/reliability.md` itself.

python -m tests.nightly.run                                   # ten million steps, 100,000 rules for each pair
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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from xml.etree import ElementTree

from llmkit.metrics.environment import environment
from tests.nightly.page import Circumstances, Suite, write_page
from tests.nightly.volume import Budget, Pair, Tally, all_pairs, run_pair

ROOT = Path(__file__).resolve().parents[2]
PAGES = (":!docs/models.md", ":!docs/reliability.md")
SUITES = {"slow": "slow and not cuda and not mutant", "mutants": "mutant"}
"""Marker expressions of tests that pytest runs for the page."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What came of every part; None for a suite that was left out."""

    tallies: list[Tally]
    mutants: Suite | None
    slow: Suite | None

    @property
    def has_failed(self) -> bool:
        """Whether anything is wrong."""
        suites = [suite for suite in (self.mutants, self.slow) if suite is not None]
        return any(tally.failures for tally in self.tallies) or any(suite.failed for suite in suites)


def run_parts(budget: Budget, suites: Sequence[str], workers: int, most_seconds: float) -> Findings:
    """Everything, `workers` parts at a time, each in a process of its own: what dies takes nothing else along.

    The longest come first; one line to stderr for each.
    """
    with ThreadPoolExecutor(workers) as threads:
        tests = {name: threads.submit(run_suite, name, most_seconds) for name in SUITES if name in suites}
        pairs = [threads.submit(run_alone, pair, budget) for pair in all_pairs()]
    found = {name: future.result() for name, future in tests.items()}
    return Findings([future.result() for future in pairs], found.get("mutants"), found.get("slow"))


def run_alone(pair: Pair, budget: Budget) -> Tally:
    """All that a pair gets; if its process ends before that, a tally that says so."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            tally = pool.submit(run_pair, (pair, budget)).result()
    except Exception as fault:
        tally = Tally(pair, failures=[f"{pair}: {type(fault).__name__}: {fault}"])
    done = f"{tally.coverage.num_steps:,} steps, {tally.num_rules:,} rules, {tally.num_cells} cells"
    print(f"{pair}: {done}, {len(tally.failures)} failures", file=sys.stderr)
    return tally


def run_suite(name: str, most_seconds: float) -> Suite:
    """The tests that a marker expression selects, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", SUITES[name], f"--junitxml={report}"]
        try:
            ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False, timeout=most_seconds)
            suite = read_suite(report, ended.returncode)
        except subprocess.TimeoutExpired:
            suite = Suite(0, (f"pytest was stopped after {most_seconds:.0f} seconds",))
    print(f"{name}: {suite.num_run} tests, {len(suite.failed)} failures", file=sys.stderr)
    return suite


def read_suite(report: Path, code: int) -> Suite:
    """Count the cases of a JUnit file; a test that failed or broke is named, and so is an end of pytest without one."""
    if not report.exists():
        return Suite(0, (f"pytest ended with code {code} and no report",))
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    named = [f"{case.get('classname')}: {case.get('name')}" for case in failed]
    return Suite(len(cases), tuple(named if code in (0, 1) else [*named, f"pytest ended with code {code}"]))


def commit() -> str:
    """The commit of this tree, and whether something was changed since, but for the pages that nightly tests write."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "--", ".", *PAGES], capture_output=True, text=True, check=False
    )
    return (head.stdout.strip() or "unknown") + (" with changes" if dirty.stdout.strip() else "")


def machine() -> str:
    """Processor and cores."""
    found = environment()
    return f"{found['device_name']}, cores: {found['num_cpus']}"


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
    parser.add_argument(
        "--minutes", type=float, default=40.0, help="most that the mutants, or the slow tests, may take"
    )
    parser.add_argument("--no-mutants", action="store_true", help="leave the seeded mutants out")
    parser.add_argument("--no-slow", action="store_true", help="leave the tests marked slow out")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reliability.md", help="where to write")
    options = parser.parse_args(arguments)
    started, before = time.perf_counter(), commit()
    share = len(all_pairs())
    budget = Budget(-(-options.steps // share), options.rules, -(-options.cells // share), options.seed)
    suites = [name for name in SUITES if not getattr(options, f"no_{name}")]
    findings = run_parts(budget, suites, options.workers, 60.0 * options.minutes)
    command = " ".join(["python -m tests.nightly.run", *without_page(sys.argv[1:] if arguments is None else arguments)])
    where = Circumstances(before, platform.python_version(), command, time.perf_counter() - started, machine())
    page = write_page(findings.tallies, budget, findings.mutants, findings.slow, where)
    options.page.write_text(page, encoding="utf-8")
    print(f"written: {options.page.name}")
    return int(findings.has_failed)


if __name__ == "__main__":
    sys.exit(main())
