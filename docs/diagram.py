"""Draws docs/diagram.png, the picture of one step: `python docs/diagram.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

CORE, PLUGIN, EDGE, TEXT = "#e8eef7", "#fde9c9", "#33415c", "#1b2433"


def box(
    axes: Axes, x: float, y: float, width: float, height: float, title: str, text: str = "", fill: str = CORE
) -> None:
    """A titled box with its lower left corner at (x, y)."""
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=EDGE, linewidth=1.3))
    top = y + height - 0.3
    axes.text(x + width / 2, top, title, ha="center", va="center", fontsize=10.5, weight="bold", color=TEXT)
    axes.text(x + width / 2, (y + top - 0.15) / 2, text, ha="center", va="center", fontsize=8.6, color=TEXT)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", dy: float = 0.14) -> None:
    """An arrow with a caption at its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=EDGE, linewidth=1.4))
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + dy)
    axes.text(*middle, text, ha="center", va="bottom", fontsize=8.4, color=EDGE, style="italic")


BOXES = [
    (0.2, 5.6, 2.5, 2.0, "LLM", "tokenise prompts,\nstream text,\ngroup n samples", CORE),
    (3.9, 5.6, 3.3, 2.0, "Engine.step", "plan -> launch -> land\nstop checks, outputs,\n0 or 1 step in flight", CORE),
    (
        9.0,
        5.6,
        3.0,
        2.0,
        "TorchExecutor",
        "pack inputs, one forward\npass for all rows;\ntokens stay on the device",
        CORE,
    ),
    (12.9, 5.6, 2.3, 2.0, "Sampler", "noise = f(seed,\nposition)", CORE),
    (3.9, 2.9, 3.3, 1.7, "Planner", "queues, lengths, epochs;\nblocks and slots pinned\nwhile a step names them", CORE),
    (9.0, 2.9, 3.0, 1.7, "Network", "any transformers causal LM;\nfused layers where certified", CORE),
    (0.2, 0.4, 2.9, 1.5, "Scheduler", "continuous, priority,\nsjf, static, ...", PLUGIN),
    (4.1, 0.4, 2.9, 1.5, "CacheAllocator", "paged, radix,\ncontiguous", PLUGIN),
    (9.0, 0.4, 3.0, 1.5, "AttentionBackend", "sdpa, flash, ...", PLUGIN),
    (12.9, 0.4, 2.3, 1.5, "Observers", "metrics, traces,\nyour hooks", PLUGIN),
]
ARROWS = [
    ((2.7, 6.6), (3.9, 6.6), "requests"),
    ((7.2, 6.9), (9.0, 6.9), "StepPlan (ints)"),
    ((9.0, 6.1), (7.2, 6.1), "token ids, later"),
    ((12.0, 6.6), (12.9, 6.6), "logits"),
    ((5.3, 5.6), (5.3, 4.6), ""),
    ((5.8, 4.6), (5.8, 5.6), ""),
    ((10.5, 5.6), (10.5, 4.6), ""),
    ((4.0, 2.9), (2.6, 1.9), ""),
    ((5.55, 2.9), (5.55, 1.9), ""),
    ((10.5, 2.9), (10.5, 1.9), ""),
]
NOTES = [
    (1.75, 2.45, "center", "schedule(queue, step)\nstep.run / preempt / reject"),
    (5.75, 2.4, "left", "allocate, commit, free"),
    (10.7, 2.4, "left", "plan once a step,\nforward once a layer"),
    (12.75, 5.0, "center", "step and request events"),
]
EVENTS = ([7.2, 8.2, 8.2, 14.05, 14.05], [5.8, 5.8, 4.85, 4.85, 2.0])


def draw(path: Path) -> None:
    """The walk of a request through one step, core in blue, plugins in yellow."""
    figure, axes = pyplot.subplots(figsize=(12.4, 6.4), dpi=150)
    axes.set(xlim=(0, 15.4), ylim=(0.1, 8.1))
    axes.axis("off")
    for spec in BOXES:
        box(axes, *spec)
    for start, end, text in ARROWS:
        arrow(axes, start, end, text)
    for x, y, align, text in NOTES:
        axes.text(x, y, text, ha=align, va="center", fontsize=8.4, color=EDGE, style="italic")
    axes.plot(*EVENTS, color=EDGE, linewidth=1.1, linestyle=":")
    axes.text(0.2, 7.85, "One step of llmkit", fontsize=13, weight="bold", color=TEXT)
    axes.text(15.2, 7.85, "blue: core (mechanism)    yellow: plugins (choices)", ha="right", fontsize=9.5, color=TEXT)
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("diagram.png"))
