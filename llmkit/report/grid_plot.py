"""The grid's picture: throughput, speedup and latency (rows) for each batch size (columns)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmkit.report.style import BLUE, GREY, LIGHT, ORANGE, frame, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
Across = tuple[list[int], list[int]]
"""Prompt lengths and output lengths of the whole grid."""
ARMS = {"optimized": ("llmkit, the batch at once", BLUE), "naive": ("transformers.generate, one by one", ORANGE)}
MARKERS = "osD^v<>P"
SPREAD = 0.5  # how far the points of one prompt length stand apart, in units of the axis


def grid_picture(result: Mapping[str, Any], dpi: int = 130) -> bytes:
    """A PNG of a grid's `result.json`."""
    buffer = io.BytesIO()
    grid_figure(result).savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def grid_figure(result: Mapping[str, Any]) -> Figure:
    """The figure, with title, units and where the numbers come from; every axis of values starts at zero."""
    rows: Sequence[Row] = result["rows"]
    sizes = sorted({row["batch_size"] for row in rows})
    # The panels share an axis, also where Ctrl-C left one with fewer cells than the others.
    across = sorted({row["prompt_len"] for row in rows}), sorted({row["max_tokens"] for row in rows})
    figure, axes = new_figure(3, len(sizes), (max(10.0, 4.2 * len(sizes)), 10.5), sharey="row", sharex=True)
    for column, size in enumerate(sizes):
        cells = [row for row in rows if row["batch_size"] == size]
        top, middle, bottom = axes[:, column]
        top.set_title(f"batch size {size}", fontweight="bold")
        _points(top, cells, across, "{}_tok_s", "{}_tok_s_range")
        _speedups(middle, cells, across, result["geometric_means"][str(size)])
        _points(bottom, cells, across, "{}_mean_e2el_ms", "{}_mean_e2el_ms_range")
        bottom.set_xlabel("prompt length, tokens")
        for panel in (top, middle, bottom):
            _axis(panel, across[0])
            tidy(panel)
    labels = (
        "throughput\noutput tokens per second",
        "speedup\nllmkit / transformers",
        "latency, ms\nmean, submission to last token",
    )
    keys = (("optimized_tok_s", "naive_tok_s"), ("speedup",), ("optimized_mean_e2el_ms", "naive_mean_e2el_ms"))
    for panel, label, shown in zip(axes[:, 0], labels, keys, strict=True):
        panel.set_ylabel(label)
        # One disturbed round may be far off: the medians set the scale, bars beyond it are cut.
        panel.set_ylim(0, 1.3 * max(row[key] for row in rows for key in shown))
        panel.yaxis.set_major_formatter("{x:,.0f}")
    _explain(figure, result, rows)
    return figure


def _axis(panel: Axes, prompt_lens: Sequence[int]) -> None:
    """Prompt lengths stand side by side as categories."""
    panel.set_xticks(range(len(prompt_lens)), [str(length) for length in prompt_lens])
    panel.set_xlim(-0.5, len(prompt_lens) - 0.5)
    panel.tick_params(axis="x", length=0)
    for index in range(len(prompt_lens) - 1):
        panel.axvline(index + 0.5, color=LIGHT, linewidth=0.8)


def _offsets(count: int) -> list[float]:
    """Positions around a category's centre."""
    return [0.0] if count == 1 else [SPREAD * (index / (count - 1) - 0.5) for index in range(count)]


def _points(panel: Axes, cells: Sequence[Row], across: Across, key: str, range_key: str) -> None:
    """Both arms: the median as a marker (its shape tells the output length), the range as a bar."""
    prompt_lens, lengths = across
    for arm, (_, colour) in ARMS.items():
        for offset, length, marker in zip(_offsets(len(lengths)), lengths, _markers(lengths), strict=True):
            chosen = [row for row in cells if row["max_tokens"] == length]
            x = [prompt_lens.index(row["prompt_len"]) + offset for row in chosen]
            y = [row[key.format(arm)] for row in chosen]
            spread = [row[range_key.format(arm)] for row in chosen]
            _draw(panel, x, y, spread, color=colour, marker=marker)


def _draw(panel: Axes, x: list[float], y: list[float], spread: list[list[float]], **style: Any) -> None:
    below = [value - low for value, (low, _) in zip(y, spread, strict=True)]
    above = [high - value for value, (_, high) in zip(y, spread, strict=True)]
    panel.errorbar(x, y, yerr=[below, above], linestyle="none", markersize=6, elinewidth=1.4, capsize=2, **style)


def _speedups(panel: Axes, cells: Sequence[Row], across: Across, mean: Mapping[str, Any]) -> None:
    """Each cell's speedup, and the geometric mean of all as a line."""
    prompt_lens, lengths = across
    for offset, length, marker in zip(_offsets(len(lengths)), lengths, _markers(lengths), strict=True):
        chosen = [row for row in cells if row["max_tokens"] == length]
        x = [prompt_lens.index(row["prompt_len"]) + offset for row in chosen]
        _draw(panel, x, [r["speedup"] for r in chosen], [r["speedup_range"] for r in chosen], color=BLUE, marker=marker)
    panel.axhline(1.0, color=ORANGE, linewidth=1.2)
    panel.axhline(mean["speedup"], color=BLUE, linewidth=1.2, linestyle="--")
    interval = f" [{mean['low']:.2f}, {mean['high']:.2f}]" if mean.get("low") is not None else ""
    panel.set_title(f"geometric mean {mean['speedup']:.2f}x{interval}", color=BLUE, fontsize=10)


def _markers(lengths: Sequence[int]) -> list[str]:
    return [MARKERS[index % len(MARKERS)] for index in range(len(lengths))]


def _explain(figure: Figure, result: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Title, legend and caption."""
    from matplotlib.lines import Line2D

    lengths = sorted({row["max_tokens"] for row in rows})
    handles = [Line2D([], [], color=colour, marker="s", linestyle="none") for _, colour in ARMS.values()]
    names = [name for name, _ in ARMS.values()]
    for length, marker in zip(lengths, _markers(lengths), strict=True):
        handles.append(Line2D([], [], color=GREY, marker=marker, linestyle="none"))
        names.append(f"{length} output tokens")
    frame(figure, "A batch at once with llmkit, or one prompt after the other with transformers", caption(result))
    figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.965), ncols=len(names), frameon=False)


def caption(result: Mapping[str, Any]) -> str:
    """How it was measured, on what, with which versions."""
    environment, baseline = result["environment"], result["baseline"]
    versions = environment["versions"]
    labels = ", ".join(f"{key} {value}" for key, value in result["labels"].items() if key != "workload")
    rounds = result["num_rounds"]
    measured = (
        f"Markers: median of {rounds} interleaved rounds, bars: lowest to highest, cut at the frame"
        if rounds > 1
        else "One round"
    )
    machine = f"{environment['device_name']}, cores: {environment['num_cpus']}, threads: {environment['num_threads']}"
    agreement = f"{100 * result['equal_tokens']:.1f} %"
    return (
        f"{measured}. Greedy, end of text ignored, both arms in one process on the same weights. "
        f"{labels}; dtype {environment['dtype'] or baseline['naive_dtype']}; {machine}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, Python {versions['python']}; "
        f"{environment['date'][:10]}, commit {(environment['commit'] or 'unknown')[:10]}. "
        f"Output tokens equal in both arms: {agreement}. Latency counts from the batch's submission."
        + " In brackets: 95 % interval of the mean over these cells." * bool(rounds > 1)
        + " Interrupted: the cells measured so far." * bool(result["interrupted"])
    )
