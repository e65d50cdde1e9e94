"""A grid's result as the README's table, put between two markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from llmkit.errors import ConfigError
from llmkit.report.grid_plot import caption

BEGIN, END = "<!-- results: begin (written by benchmarks/results.py) -->", "<!-- results: end -->"


def grid_markdown(result: Mapping[str, Any]) -> str:
    """One row a batch size: geometric means of both throughputs and of the speedup, and the cells' range."""
    lines = [
        "| batch size | llmkit, tok/s | transformers, tok/s | speedup | least to most |",
        "|---:|---:|---:|---:|---:|",
    ]
    for size, mean in result["geometric_means"].items():
        rows = [row for row in result["rows"] if str(row["batch_size"]) == size]
        cells = [size, _mean(rows, "optimized_s"), _mean(rows, "naive_s"), _speedup(mean), _range(rows)]
        lines.append("| " + " | ".join(cells) + " |")
    shapes = [sorted({row[key] for row in result["rows"]}) for key in ("prompt_len", "max_tokens")]
    prompts, outputs = (", ".join(map(str, values)) for values in shapes)
    note = f"Geometric means over rounds, prompts of {prompts} tokens and outputs of {outputs}. {caption(result)}"
    return "\n".join([*lines, "", note])


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Tokens per second over all rounds, as the speedup is."""
    num_rounds = min(len(row[arm]) for row in rows for arm in ("optimized_s", "naive_s"))
    rates = [row["batch_size"] * row["max_tokens"] / seconds for row in rows for seconds in row[key][:num_rounds]]
    return f"{geometric_mean(rates):,.0f}"


def _speedup(mean: Mapping[str, Any]) -> str:
    interval = f" [{mean['low']:.2f}, {mean['high']:.2f}]" if mean.get("low") is not None else ""
    return f"**{mean['speedup']:.2f}x**{interval}"


def _range(rows: Sequence[Mapping[str, Any]]) -> str:
    speedups = [row["speedup"] for row in rows]
    return f"{min(speedups):.2f}x to {max(speedups):.2f}x"


def replace_between_markers(text: str, table: str) -> str:
    """`text` with `table` between the markers; ConfigError if they are not there exactly once, in order."""
    begin, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or begin > end:
        raise ConfigError(f"the table goes between the lines {BEGIN!r} and {END!r}, each once; they are not there")
    return f"{text[: begin + len(BEGIN)]}\n{table}\n{text[end:]}"
