"""The grid's table and picture show the numbers they were given, from zero, with units and origin."""

from __future__ import annotations

import io
from itertools import product
from statistics import geometric_mean
from typing import Any

import pytest
from rich.console import Console

from llmkit.metrics.environment import environment
from llmkit.metrics.grid import Cell, Timing, summarise_grid
from llmkit.report.grid import describe_mean, print_grid
from llmkit.report.grid_plot import caption, grid_figure, grid_picture

ROUNDS = (1.0, 1.1, 0.95)


def result(batch_sizes: tuple[int, ...] = (1, 4), num_rounds: int = 3, **changes: Any) -> dict[str, Any]:
    cells = []
    for batch_size, prompt_len, max_tokens in product(batch_sizes, (8, 32), (16, 64)):
        cell = Cell(prompt_len, batch_size, max_tokens, num_equal_tokens=199, num_compared_tokens=200)
        for factor in ROUNDS[:num_rounds]:
            cell.optimized.append(Timing(0.02 * max_tokens * factor, 0.02 * max_tokens))
            cell.naive.append(Timing(0.03 * max_tokens * batch_size, 0.02 * max_tokens * batch_size))
        cells.append(cell)
    context = {
        "title": "grid: model=embedded",
        "interrupted": False,
        "labels": {"model": "embedded"},
        "environment": {**environment(), "dtype": "float32", "num_threads": 2},
        "baseline": {"naive_dtype": "float32"},
    }
    return {**summarise_grid(cells), **context, **changes}


def test_the_picture_holds_every_cell_of_both_arms() -> None:
    given = result()
    figure = grid_figure(given)
    assert len(figure.axes) == 3 * 2
    throughput = figure.axes[1]
    heights = sorted(y for container in throughput.containers for y in container[0].get_ydata())
    rows = [row for row in given["rows"] if row["batch_size"] == 4]
    expected = sorted(row[key] for row in rows for key in ("optimized_tok_s", "naive_tok_s"))
    assert heights == pytest.approx(expected)
    speedups = sorted(y for container in figure.axes[3].containers for y in container[0].get_ydata())
    assert speedups == pytest.approx(sorted(row["speedup"] for row in rows))


def test_axes_start_at_zero_and_carry_units() -> None:
    figure = grid_figure(result())
    assert all(axes.get_ylim()[0] == 0 for axes in figure.axes)
    labels = [axes.get_ylabel() for axes in figure.axes[::2]]
    assert ["tokens per second" in labels[0], "speedup" in labels[1], "ms" in labels[2]] == [True] * 3
    assert {axes.get_xlabel() for axes in figure.axes[-2:]} == {"prompt length, tokens"}
    assert [axes.get_title() for axes in figure.axes[:2]] == ["batch size 1", "batch size 4"]
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert any("transformers" in text for text in texts)
    assert "64 output tokens" in texts


def test_the_caption_says_where_the_numbers_come_from() -> None:
    text = caption(result())
    for fact in ("median of 3 interleaved rounds", "float32", "threads: 2", "torch 2", "embedded", "99.5 %"):
        assert fact in text
    assert "One round" in caption(result(num_rounds=1))


def test_an_interrupted_grid_shows_every_cell_that_was_measured() -> None:
    given = result(num_rounds=1, interrupted=True)
    given["rows"] = [row for row in given["rows"] if row["batch_size"] == 1 or row["prompt_len"] == 8]
    figure = grid_figure(given)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["8", "32"]
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert all(low < x < high for container in axes.containers for x in container[0].get_xdata())
    assert caption(given).endswith(" Interrupted: the cells measured so far.") and "brackets" not in caption(given)
    assert caption(result()).endswith(" In brackets: 95 % interval of the mean over these cells.")


@pytest.mark.parametrize("batch_sizes", [(1,), (2,), (1, 2, 4, 8, 16)])
def test_any_number_of_batch_sizes_can_be_drawn(batch_sizes: tuple[int, ...]) -> None:
    assert grid_picture(result(batch_sizes, num_rounds=1), dpi=40).startswith(b"\x89PNG")


@pytest.mark.parametrize("batch_sizes", [(4,), (1, 4)])
def test_heading_and_legend_lie_within_the_picture(batch_sizes: tuple[int, ...]) -> None:
    figure = grid_figure(result(batch_sizes))
    figure.draw_without_rendering()
    width = figure.get_size_inches()[0] * figure.dpi
    for part in (*figure.texts, *figure.legends):
        extent = part.get_window_extent()
        assert extent.x0 >= 0 and extent.x1 <= width


def test_the_table_shows_rows_means_and_agreement() -> None:
    text = io.StringIO()
    given = result(interrupted=True)
    print_grid(Console(file=text, width=100), given)
    shown = text.getvalue()
    row = given["rows"][0]
    assert f"{row['optimized_tok_s']:,.1f}" in shown
    assert f"batch 4: geometric mean {6 / geometric_mean(ROUNDS[:3]):.2f}x (95 % interval" in shown
    assert "99.5 % of tokens equal" in shown
    assert "interrupted" in shown


def test_a_mean_without_interval_has_none() -> None:
    assert describe_mean({"speedup": 2.0, "low": None, "high": None}) == "2.00x"
    assert describe_mean({"speedup": 2.0, "low": 1.5, "high": 2.5}) == "2.00x (95 % interval 1.50 to 2.50)"
