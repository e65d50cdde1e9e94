"""The grid's statistics on timings made by hand."""

from __future__ import annotations

import pytest

from llmkit.metrics.grid import Cell, Timing, compare_tokens, mean_speedup, summarise_grid, timing


def cell(batch_size: int, optimized: list[float], naive: list[float]) -> Cell:
    return Cell(
        8,
        batch_size,
        10,
        [Timing(seconds, seconds) for seconds in optimized],
        [Timing(seconds, seconds / 2) for seconds in naive],
        num_equal_tokens=9,
        num_compared_tokens=10,
        num_equal_outputs=1,
    )


def test_a_row_holds_medians_and_ranges() -> None:
    row = cell(4, [1.0, 2.0, 4.0], [10.0, 8.0, 9.0]).row()
    assert row["optimized_tok_s"] == pytest.approx(40 / 2.0)
    assert row["naive_tok_s"] == pytest.approx(40 / 9.0)
    assert row["speedup"] == pytest.approx(9.0 / 2.0)
    assert row["speedup_range"] == pytest.approx([9.0 / 4.0, 10.0])
    assert row["optimized_tok_s_range"] == pytest.approx([10.0, 40.0])
    assert row["naive_mean_e2el_ms"] == pytest.approx(4500)


def test_the_mean_is_geometric_and_its_interval_is_over_rounds() -> None:
    mean = mean_speedup([cell(1, [1.0, 1.0], [2.0, 2.0]), cell(1, [1.0, 1.0], [8.0, 8.0])])
    assert mean["speedup"] == pytest.approx(4.0)
    assert (mean["low"], mean["high"]) == pytest.approx((4.0, 4.0))
    noisy = mean_speedup([cell(1, [1.0, 1.2, 0.9], [4.0, 4.0, 4.0])])
    assert noisy["low"] < noisy["speedup"] < noisy["high"]
    ones = [1.0, 1.0, 1.0]
    in_turn = mean_speedup(
        [cell(1, ones, [8.1, 4.0, 4.0]), cell(1, ones, [4.0, 8.0, 4.0]), cell(1, ones, [4.0, 4.0, 8.0])]
    )
    assert in_turn["low"] < in_turn["speedup"] < in_turn["high"], "a round that is slow in each cell counts in both"
    assert noisy["num_pairs"] == 3


def test_an_unfinished_round_does_not_count() -> None:
    cells = [cell(1, [1.0, 1.0], [2.0]), cell(4, [], [])]
    summary = summarise_grid(cells)
    assert summary["num_rounds"] == 0
    assert [row["batch_size"] for row in summary["rows"]] == [1]
    assert list(summary["geometric_means"]) == ["1"]
    assert summary["rows"][0]["optimized_tok_s"] == pytest.approx(10.0)
    assert summary["geometric_means"]["1"]["low"] is None


def test_nothing_measured_is_an_empty_table() -> None:
    summary = summarise_grid([Cell(8, 1, 4)])
    assert (summary["rows"], summary["geometric_means"], summary["equal_tokens"]) == ([], {}, None)


def test_outputs_are_compared_position_by_position() -> None:
    measured = Cell(1, 2, 3)
    compare_tokens(measured, [(1, 2, 3), (4, 5, 6)], [[1, 2, 3], [4, 0, 6]])
    assert (measured.num_equal_tokens, measured.num_compared_tokens, measured.num_equal_outputs) == (5, 6, 1)
    with pytest.raises(ValueError, match="zip"):
        compare_tokens(measured, [(1, 2)], [[1, 2, 3]])


def test_a_timing_starts_at_submission() -> None:
    assert timing(1.0, [2.0, 4.0]) == Timing(3.0, 2.0)
