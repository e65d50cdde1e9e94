"""The nightly tier in small: it counts what it did, names what failed, and its page says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmkit import load_plugins
from llmkit.engine.residency import Residency
from tests.nightly import rate, replay, run, volume
from tests.nightly.faults import HOOKS
from tests.nightly.page import Circumstances, Suite, write_page
from tests.nightly.volume import Budget, Pair, Tally, all_pairs, run_pair

SMALL = Budget(steps=300, rules=240, cells=len(HOOKS), seed=50)
WHERE = Circumstances("abc", "3.13", "make nightly", 120.0)


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """Commands switch logging off for their process; other tests read logs."""
    yield
    logging.disable(logging.NOTSET)


def test_every_pair_there_is_is_gone_through() -> None:
    registry, _ = load_plugins()
    pairs = all_pairs()
    assert len(pairs) == len(registry.names("scheduler")) * len(registry.names("cache")) > 5
    assert Pair("continuous", "paged") in pairs


def test_a_pair_gets_its_budget_and_the_page_counts_it() -> None:
    tally = run_pair((Pair("priority", "paged"), SMALL))
    assert tally.failures == [] and tally.coverage.num_steps >= 300 and tally.last_seed >= 50
    assert tally.num_rules >= 240 and tally.num_cells == len(HOOKS) >= tally.num_cells_raised > 5
    page = write_page([tally], SMALL, Suite(40, ()), None, WHERE)
    count = tally.coverage
    assert f"| priority | paged | {count.num_walks:,} | {count.num_steps:,} | {count.num_tokens:,} |" in page
    assert max(map(len, page.splitlines())) <= 120
    page = " ".join(page.split())
    assert f"{tally.num_rules:,} hypothesis rules" in page and "for commit abc on Python 3.13, in 2 minutes" in page
    assert "40 seeded bugs" in page and "0 survived" in page and "**0 failures.**" in page
    assert page.endswith("## Failures None.") and "Not part of this run." in page


def test_what_fails_is_named_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = Residency.leave

    def hasty(self: Residency, request: Any) -> int:
        request.last_step_id = -1
        return leave(self, request)

    monkeypatch.setattr(Residency, "leave", hasty)
    tally = Tally(Pair("continuous", "paged"))
    volume.walk_pair(tally, *tally.pair.load(), Budget(10_000, 0, 0, 0))
    assert len(tally.failures) >= volume.MOST_FAILURES and tally.coverage.num_steps < 10_000
    page = write_page([tally], SMALL, Suite(3, ("a: b",)), Suite(9, ()), WHERE)
    assert "\n- continuous on paged: Continuous on PagedCache, depth" in page and "seed " in page
    assert "1 survived: a: b." in page.replace("\n", " ") and "9 slow tests ran; 0 failed." in page


def test_reports_of_pytest_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    cases = '<testcase classname="t" name="one"/><testcase classname="t" name="two"><failure/></testcase>'
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert run.read_suite(report, 1) == Suite(2, ("t: two",))
    assert run.read_suite(report, 2) == Suite(2, ("t: two", "pytest ended with code 2"))
    assert run.read_suite(tmp_path / "none.xml", -9) == Suite(0, ("pytest ended with code -9 and no report",))


def test_tests_that_take_too_long_are_stopped_and_named() -> None:
    assert run.run_suite("slow", 0.01) == Suite(0, ("pytest was stopped after 0 seconds",))


def test_a_pair_whose_process_dies_takes_nothing_else_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair that is not registered cannot even be loaded, the other one is gone through all the same."""
    pairs = [Pair("nobody", "paged"), Pair("continuous", "contiguous")]
    monkeypatch.setattr(run, "all_pairs", lambda: pairs)
    found = run.run_parts(Budget(steps=20, rules=20, cells=1, seed=9), [], workers=2, most_seconds=60)
    broken, whole = found.tallies
    assert len(broken.failures) == 1 and "nobody" in broken.failures[0] and found.has_failed
    assert whole.failures == [] and whole.coverage.num_steps >= 20 and whole.num_rules >= 20


def test_a_walk_is_repeated_by_its_seed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay.main(["fair", "radix", "1000004", "--depth", "1"]) == 0
    assert "nothing is wrong after" in capsys.readouterr().out
    leave = Residency.leave

    def hasty(self: Residency, request: Any) -> int:
        request.last_step_id = -1
        return leave(self, request)

    monkeypatch.setattr(Residency, "leave", hasty)
    seed = next(seed for seed in range(40) if replay.main(["continuous", "paged", str(seed), "--depth", "1"]))
    out = capsys.readouterr().out
    assert "Event(at=" in out and f"the state machine: Continuous on PagedCache, depth 1, seed {seed}, step" in out


@pytest.mark.parametrize("failures", [[], ["seed 3: wrong"]])
def test_the_command_writes_the_page_whatever_it_found(
    failures: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tally = Tally(Pair("continuous", "paged"), failures=failures)
    monkeypatch.setattr(run, "run_parts", lambda *arguments: run.Findings([tally], None, None))
    page = tmp_path / "page.md"
    options = ["--no-mutants", "--no-slow", "--steps", "480", "--page", str(page)]
    assert run.main(options) == len(failures)
    text = page.read_text()
    assert "`python -m tests.nightly.run --no-mutants --no-slow --steps 480` wrote" in text
    assert f"**{len(failures)} failures.**" in text


def test_rates_are_measured_on_one_core_and_side_by_side(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "all_pairs", lambda: [Pair("continuous", "paged"), Pair("sjf", "contiguous")])
    assert rate.main(["--steps", "60", "--processes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "continuous on paged", "sjf on contiguous", "one core, all pairs", "2 processes side by side, wall clock",
    ]  # fmt: skip
    assert all(int(line.split()[-2].replace(",", "")) > 100 for line in lines[1:])


def test_a_rate_of_walks_that_fail_is_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = rate.Round([Tally(Pair("fair", "radix"), step_seconds=1.0, failures=["fair on radix: seed 7"])], 1.0)
    monkeypatch.setattr(rate, "side_by_side", lambda *arguments: [broken])
    assert rate.main([]) == 1
    assert capsys.readouterr().out.endswith("\nfair on radix: seed 7\nfair on radix: seed 7\n")
