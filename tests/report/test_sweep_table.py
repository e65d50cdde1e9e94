"""The comparison at the end of a sweep."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console

from llmkit.report.sweep_table import print_sweep

SERVED = {
    "output_throughput": 1234.56,
    "p50_ttft_ms": 5.0,
    "p50_tpot_ms": None,
    "p99_e2el_ms": 99.0,
    "num_preemptions": 3,
    "kv_waste": 0.25,
}


def printed(*runs: tuple[str, dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_sweep(runs, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_served_runs_side_by_side() -> None:
    text = printed(("0-static", SERVED), ("1-[x]", {**SERVED, "num_preemptions": 0}))
    assert text.index("0-static") < text.index("1-[x]")
    assert "1,234.6" in text and "5.00" in text and "25.0 %" in text and "speedup" not in text


def test_options_that_differ_have_a_column() -> None:
    def run(*overrides: str) -> dict[str, Any]:
        return {**SERVED, "environment": {"overrides": ["workload.rate=4", *overrides]}}

    text = printed(
        ("0-a", run("cache=paged", "engine=exact", "cache.eviction=lru", "engine.num_blocks=64")),
        ("1-a", run("cache=radix", "engine=default", "cache.eviction=lfu", "engine.num_blocks=64")),
    )
    assert "rate" not in text and "radix" not in text
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:]] for line in text.splitlines()]
    shown = {row[0]: row[1:3] for row in rows if row}
    assert shown["run"] == ["engine", "cache.eviction"]
    assert [shown[name] for name in ("0-a", "1-a")] == [["exact", "lru"], ["default", "lfu"]]


def test_columns_of_what_only_some_runs_have() -> None:
    tenants = {"a": {"mean_ttft_ms": 12.0}, "b": {"mean_ttft_ms": 345.6}}
    special = {**SERVED, "prefix_hit_rate": 0.5, "deadlines_met": 0.0, "tenants": tenants}
    text = printed(
        ("0-plain", {**SERVED, "prefix_hit_rate": 0.0, "deadlines_met": None, "tenants": {}}), ("1", special)
    )
    assert all(column in text for column in ("prefix hits", "deadlines met", "tenants' mean ttft, ms"))
    assert "12.0 to 345.6" in text and "50.0 %" in text and "0.0 %" in text
    text = printed(("0-plain", SERVED), ("1-plain", {**SERVED, "prefix_hit_rate": 0.0}))
    assert not any(column in text for column in ("prefix hits", "deadlines met", "tenants"))


def test_grids_show_their_geometric_means_and_what_is_missing_is_a_dash() -> None:
    means = {"1": {"speedup": 1.5}, "8": {"speedup": 6.25}}
    text = printed(("0-grid", {"geometric_means": means}), ("1-none", {}))
    assert "speedup at batch 8" in text and "6.25x" in text and "tok/s" not in text
    (line,) = [line for line in text.splitlines() if "1-none" in line]
    assert [cell.strip() for cell in line.split("│")[2:4]] == ["-", "-"]
