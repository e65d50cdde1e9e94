"""A run's numbers as rows for people, with units; used for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = list[tuple[str, str]]
LATENCY_NAMES = {
    "ttft": "first token (ttft)",
    "tpot": "per output token (tpot)",
    "itl": "between tokens (itl)",
    "e2el": "end to end (e2el)",
}
STATISTICS = ("mean", "p50", "p90", "p95", "p99")


def number(value: float | int | None, unit: str = "", digits: int = 1) -> str:
    """A number for reading: thousands separated, "-" for what was not measured."""
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return f"{text} {unit}".rstrip()


def milliseconds(value: float | None) -> str:
    """A latency with about three digits that mean something."""
    return number(value, digits=2 if value is not None and value < 10 else 1)


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else f"{share:.1%}".replace("%", " %")


def overview(result: Mapping[str, Any]) -> Rows:
    """Everything that is one number."""
    ended = f"{result['completed']} completed, {result['failed']} failed, {result['aborted']} aborted"
    rows = [
        ("requests", f"{ended} of {result['num_prompts']}" + (" (interrupted)" if result["interrupted"] else "")),
        ("duration", number(result["duration"], "s", 2)),
        ("output throughput", number(result["output_throughput"], "tok/s")),
        ("input throughput", number(result["input_throughput"], "tok/s")),
        ("total throughput", number(result["total_token_throughput"], "tok/s")),
        ("request throughput", number(result["request_throughput"], "req/s", 2)),
    ]
    if result["request_goodput"] is not None:
        rows.append(("goodput", number(result["request_goodput"], "req/s", 2)))
    if result["deadlines_met"] is not None:
        rows.append(("deadlines met", percent(result["deadlines_met"])))
    if spread := tenants_ttft(result):
        rows.append(("tenants", f"{len(result['tenants'])}, mean ttft {spread} ms"))
    rows += [
        ("steps", f"{number(result['num_steps'])}, {number(result['tokens_per_step'], 'tokens each')}"),
        ("most requests at once", number(result["max_concurrent_requests"])),
        ("preemptions", f"{result['num_preemptions']}, recompute tax {percent(result['recompute_tax'])}"),
        *swap_row(result),
        ("KV cache", f"{percent(result['kv_utilisation'])} in use, {percent(result['kv_waste'])} of it not written"),
        (
            "prefix hits",
            f"{percent(result['prefix_hit_rate'])} of {number(result['prefix_queried_tokens'])} prompt tokens",
        ),
        ("host time", number(result["host_us_per_step"], "us per step")),
    ]
    if result["gpu_idle"] is not None:
        rows.append(("GPU idle", f"at least {percent(result['gpu_idle'])}"))
    return rows


def swap_row(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Blocks copied to the host and back, if any were."""
    num_saved, num_restored = result.get("num_saved_blocks", 0), result.get("num_restored_blocks", 0)
    return [("swapped", f"{num_saved} blocks out, {num_restored} back")] if num_saved else []


def tenants_ttft(result: Mapping[str, Any]) -> str:
    """Lowest and highest mean time to first token of any tenant, ms; empty where there is only one."""
    means = [tenant["mean_ttft_ms"] for tenant in result.get("tenants", {}).values()]
    means = [mean for mean in means if mean is not None]
    return f"{milliseconds(min(means))} to {milliseconds(max(means))}" if means else ""


def latency_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a latency: its name, then `STATISTICS` in milliseconds."""
    return [
        (words, *(milliseconds(result[f"{statistic}_{name}_ms"]) for statistic in STATISTICS))
        for name, words in LATENCY_NAMES.items()
    ]


def print_summary(console: Console, title: str, result: Mapping[str, Any]) -> None:
    """Print both tables."""
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    table = Table(show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for row in overview(result):
        table.add_row(*row)
    console.print(table)
    latencies = Table(title="latency, ms", title_justify="left")
    latencies.add_column("", style="cyan")
    for statistic in STATISTICS:
        latencies.add_column(statistic, justify="right")
    for latency_row in latency_rows(result):
        latencies.add_row(*latency_row)
    console.print(latencies)
