"""The runs of a sweep side by side: one line each, what it was and its main numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmkit.report.summary_table import milliseconds, number, percent, tenants_ttft

SweepRun = tuple[str, Mapping[str, Any]]
"""The run's name and what its `result.json` holds."""
NAMED = ("scheduler", "cache", "model", "workload")


def print_sweep(runs: Sequence[SweepRun], console: Console) -> None:
    """Print a table of `runs`; columns that no run has are left out."""
    cells = [{**swept, **_cells(result)} for (_, result), swept in zip(runs, _swept(runs), strict=True)]
    columns = list(dict.fromkeys(column for row in cells for column in row))
    table = Table("run", title="sweep", title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for (name, _), row in zip(runs, cells, strict=True):
        table.add_row(escape(name), *(row.get(column, "-") for column in columns))
    console.print(table)


def _swept(runs: Sequence[SweepRun]) -> list[dict[str, str]]:
    """For each run what it was given and others were not, but for the parts that its name tells."""
    overrides = [result.get("environment", {}).get("overrides", ()) for _, result in runs]
    in_all = set(overrides[0]).intersection(*overrides) if overrides else set()
    pairs = [[word.split("=", 1) for word in words if word not in in_all] for words in overrides]
    return [{key.lstrip("+"): escape(value) for key, value in row if key not in NAMED} for row in pairs]


def _cells(result: Mapping[str, Any]) -> dict[str, str]:
    if "geometric_means" in result:
        means = result["geometric_means"].items()
        return {f"speedup at batch {batch}": f"{mean['speedup']:.2f}x" for batch, mean in means}
    if "output_throughput" not in result:
        return {}
    cells = {
        "tok/s": number(result["output_throughput"]),
        "p50 ttft, ms": milliseconds(result["p50_ttft_ms"]),
        "p50 tpot, ms": milliseconds(result["p50_tpot_ms"]),
        "p99 e2el, ms": milliseconds(result["p99_e2el_ms"]),
        "preemptions": number(result["num_preemptions"]),
        "KV not written": percent(result["kv_waste"]),
    }
    if result.get("prefix_hit_rate"):
        cells["prefix hits"] = percent(result["prefix_hit_rate"])
    if result.get("deadlines_met") is not None:
        cells["deadlines met"] = percent(result["deadlines_met"])
    if spread := tenants_ttft(result):
        cells["tenants' mean ttft, ms"] = spread
    return cells
