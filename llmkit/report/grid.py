"""The grid for people: a table on the terminal, CSV and JSON files, and the picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmkit.errors import LlmkitError
from llmkit.report.folder import write_result
from llmkit.report.grid_plot import grid_picture

COLUMNS = {
    "prompt_len": "prompt_len",
    "batch_size": "batch_size",
    "max_tokens": "max_tokens",
    "optimized_tok_s": "optimized tok/s",
    "naive_tok_s": "naive tok/s",
    "speedup": "speedup",
}
NAME = "benchmark_grid"


def reason_to_keep(plots_dir: Path, result: Mapping[str, Any]) -> str:
    """Why what `plots_dir` holds should not be replaced by this result; empty: nothing speaks against it."""
    if result["interrupted"]:
        return "this run was interrupted"
    try:
        num_cells = len((plots_dir / f"{NAME}.csv").read_text(encoding="utf-8").splitlines()) - 1
    except (OSError, UnicodeDecodeError):
        return ""
    num_rows = len(result["rows"])
    return f"its grid has {num_cells} cells, this one {num_rows}" if num_cells > num_rows else ""


def write_grid(run_dir: Path, result: Mapping[str, Any], plots_dir: Path | None, config_text: str = "") -> list[Path]:
    """`result.json` in the run folder; table and picture there and in `plots_dir`. Returns what to open first."""
    written = [write_result(run_dir, result, config_text)]
    folders = [run_dir] if plots_dir is None else [run_dir, plots_dir]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(folder / f"{NAME}.csv", result)
        except OSError as error:
            raise LlmkitError(f"cannot write the picture to {folder}: {error.strerror}; results: {run_dir}") from error
    if result["rows"]:
        picture = grid_picture(result)
        for folder in folders:
            (folder / f"{NAME}.png").write_bytes(picture)
            written.insert(0, folder / f"{NAME}.png")
    return written


def write_csv(path: Path, result: Mapping[str, Any]) -> None:
    """The table, one row a cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS.values())
        for row in result["rows"]:
            writer.writerow([value if isinstance(value, int) else f"{value:.2f}" for value in _values(row)])


def _values(row: Mapping[str, Any]) -> list[Any]:
    return [row[key] for key in COLUMNS]


def print_grid(console: Console, result: Mapping[str, Any]) -> None:
    """Print the table, the geometric means and how far the two arms' outputs agree."""
    rounds = f"median of {result['num_rounds']} rounds" if result["num_rounds"] > 1 else "one round"
    console.print(f"{result['title']} ({rounds})", style="bold", highlight=False, markup=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS.values():
        table.add_column(name, justify="right")
    size_before = None
    for row in result["rows"]:
        if size_before not in (None, row["batch_size"]):
            table.add_section()
        size_before = row["batch_size"]
        *shape, optimized, naive, speedup = _values(row)
        table.add_row(*map(str, shape), f"{optimized:,.1f}", f"{naive:,.1f}", f"{speedup:.2f}x")
    console.print(table)
    for size, mean in result["geometric_means"].items():
        console.print(f"batch {size}: geometric mean {describe_mean(mean)}", highlight=False)
    if result["equal_tokens"] is not None:
        console.print(f"outputs of the two arms: {describe_agreement(result)}", highlight=False)
    if result["interrupted"]:
        console.print("interrupted: the cells measured so far", style="yellow")


def describe_mean(mean: Mapping[str, Any]) -> str:
    """Such as "5.21x (95 % interval 5.08 to 5.34)"."""
    text = f"{mean['speedup']:.2f}x"
    if mean.get("low") is not None:
        text += f" (95 % interval {mean['low']:.2f} to {mean['high']:.2f})"
    return text


def describe_agreement(result: Mapping[str, Any]) -> str:
    """Such as "99.8 % of tokens equal, 155 of 156 outputs identical"."""
    share = f"{100 * result['equal_tokens']:.1f} % of tokens equal"
    return f"{share}, {result['equal_outputs']} of {result['num_outputs']} identical"
