"""The comparison at the end of a sweep."""

from __future__ import annotations

import io
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


def test_grids_show_their_geometric_means_and_what_is_missing_is_a_dash() -> None:
    means = {"1": {"speedup": 1.5}, "8": {"speedup": 6.25}}
    text = printed(("0-grid", {"geometric_means": means}), ("1-none", {}))
    assert "speedup at batch 8" in text and "6.25x" in text and "tok/s" not in text
    (line,) = [line for line in text.splitlines() if "1-none" in line]
    assert [cell.strip() for cell in line.split("│")[2:4]] == ["-", "-"]
