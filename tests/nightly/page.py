"""`docs/reliability.md`: what the nightly tier went through, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

from tests.nightly.volume import Budget, Tally


@dataclass(frozen=True, slots=True)
class Suite:
    """Tests that pytest ran for the page; each one that failed is named."""

    num_run: int
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Where and on what the run took place."""

    commit: str
    python: str
    command: str
    seconds: float
    machine: str = ""


def write_page(
    tallies: Sequence[Tally], budget: Budget, mutants: Suite | None, slow: Suite | None, where: Circumstances
) -> str:
    """The whole page, Markdown."""
    failures = [failure for tally in tallies for failure in tally.failures]
    parts = [
        "# Reliability",
        f"`{where.command}` wrote this page, for commit {where.commit} on Python {where.python}, in "
        f"{where.seconds / 60:.0f} minutes{f' on {where.machine}' if where.machine else ''}. Every figure is of that "
        "run; `make nightly` writes it anew, and [models.md](models.md), which goes through every architecture.",
        _totals(tallies, budget),
        "Each step of a walk is checked: every token against what its request would get alone, every query against the "
        "tags of its own prefix, tables against the census, slots, queues, limits, contents, progress, and what the "
        "scheduler promises of fairness. Worlds have 4 to 24 blocks of 1 to 8 tokens, mostly two or three different "
        "tokens, and prompts that begin alike. `python -m tests.nightly.replay SCHEDULER CACHE SEED --depth DEPTH` "
        "repeats a walk by its seed, and takes it through the state machine.",
        _table(tallies),
        "## Fault cells",
        "A cell is one exception at one call of one hook, beside 31 witnesses whose tokens must be those of a run "
        "without it; nothing may leak and the engine must serve on. Some hooks are called for one request only, which "
        "may end before the drawn call comes: those cells raised nothing and count as such.",
        "## Seeded mutants",
        _suite(mutants, "seeded bugs, each planted alone, were looked for by the test that should notice", "survived"),
        "## Slow tests",
        _suite(slow, "slow tests ran", "failed"),
        "## Failures",
        "\n".join(f"- {failure}" for failure in failures) or "None.",
    ]
    return "\n\n".join(part if part[0] in "#|-" else fill(part, 120, break_on_hyphens=False) for part in parts) + "\n"


def _totals(tallies: Sequence[Tally], budget: Budget) -> str:
    steps = sum(tally.coverage.num_steps for tally in tallies)
    seconds = max(1e-9, sum(tally.step_seconds for tally in tallies))
    num_operations, num_rules = (
        sum(tally.coverage.num_rules for tally in tallies),
        sum(tally.num_rules for tally in tallies),
    )
    rule_seconds = max(1e-9, sum(tally.rule_seconds for tally in tallies))
    last = max((tally.last_seed for tally in tallies), default=budget.seed)
    wrong = sum(len(tally.failures) for tally in tallies)
    return (
        f"{steps:,} checked steps, {num_rules:,} hypothesis rules and "
        f"{sum(tally.num_cells for tally in tallies):,} fault cells over {len(tallies)} pairs of scheduler and cache; "
        f"seeds {budget.seed} to at most {last}, depths 0, 1 and 2. In a second of one core {steps / seconds:,.0f} "
        f"steps, and {num_operations / seconds:,.0f} operations in all (requests that come or are aborted, preemptions "
        f"and probes too), each with every check behind it; {num_rules / rule_seconds:,.0f} hypothesis rules. "
        "`python -m tests.nightly.rate` measures the walks alone, on one core and on all. "
        f"**{wrong} failures.**"
    )


def _table(tallies: Sequence[Tally]) -> str:
    head = ("scheduler", "cache", "walks", "steps", "tokens", "preemptions", "tokens cached", "rules", "cells (raised)")
    rows = [head, ("---", "---", *["---:"] * (len(head) - 2))]
    for tally in tallies:
        count, cells = tally.coverage, f"{tally.num_cells:,} ({tally.num_cells_raised:,})"
        counts = count.num_walks, count.num_steps, count.num_tokens, count.num_preemptions, count.num_cached_tokens
        numbers = [f"{number:,}" for number in (*counts, tally.num_rules)]
        rows.append((tally.pair.scheduler, tally.pair.cache, *numbers, cells))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _suite(suite: Suite | None, what: str, verb: str) -> str:
    if suite is None:
        return "Not part of this run."
    named = f": {'; '.join(suite.failed)}" if suite.failed else ""
    return f"{suite.num_run} {what}; {len(suite.failed)} {verb}{named}."
