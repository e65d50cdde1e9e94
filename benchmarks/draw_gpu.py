"""Draws the committed GPU tables: throughput beside other engines and the hardware's floor, and attention's roofline.

    python benchmarks/draw_gpu.py                     # benchmarks/results/h200: *.md -> throughput.png, attention.png

Reads nothing but the Markdown tables in the folder, ours and those of `peers.md`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmkit.report.style import BLUE, GREEN, GREY, LIGHT, ORANGE, frame, new_figure, tidy

FOLDER = Path(__file__).resolve().parent / "results" / "h200"
MODELS = {"qwen3_0_6b": "Qwen3-0.6B", "llama_8b": "Llama-3.1-8B"}
ENGINES = {"llmkit": BLUE, "vLLM": ORANGE, "nano-vllm": GREEN}
KERNELS = {"llmkit": BLUE, "FlashAttention-3": ORANGE, "cuDNN": GREEN}
MARKERS = {1: "o", 8: "^", 64: "s", 256: "D"}
HEAD_DIM, BF16 = 128, 2
LATENCIES = (5, 20)
"""Microseconds a layer whose curves are drawn."""
Row = dict[str, str]


def tables(path: Path) -> Iterator[list[Row]]:
    """Every Markdown table of a file as rows by column name."""
    for block in re.findall(r"(?:^\|.*\|\n)+", path.read_text(encoding="utf-8"), re.MULTILINE):
        head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        yield [dict(zip(head, cells, strict=True)) for cells in body]


def rows_with(path: Path, *columns: str) -> list[Row]:
    """The rows of all tables of a file that have these columns."""
    return [row for table in tables(path) if table and set(columns) <= table[0].keys() for row in table]


def number(cell: str) -> float | None:
    """What a cell says; None for a dash."""
    return None if cell == "-" else float(cell.replace(",", ""))


def throughputs(folder: Path) -> list[dict[str, Any]]:
    """Per workload that `peers.md` knows: tokens/s of every engine, None if unknown, and `floor` (low, high)."""
    found = []
    for peer in rows_with(folder / "peers.md", "model", "workload"):
        path = folder / f"{peer['model']}.md"
        ours = [row for row in rows_with(path, "workload") if row["workload"] == peer["workload"]]
        low, _, high = peer["floor"].partition(" to ")
        engines = {name: number(peer[name]) for name in ENGINES if name in peer}
        found.append(
            {
                "model": peer["model"],
                "workload": peer["workload"],
                "counted": peer["counted"],
                "engines": {"llmkit": number(ours[0][peer["counted"]]) if ours else None} | engines,
                "floor": (number(low), number(high or low)),
            }
        )
    return found


def draw_throughput(folder: Path) -> Any:
    """A figure with a panel per model and a group of bars per workload, as shares of the floor."""
    measured = throughputs(folder)
    names = [name for name in MODELS if any(each["model"] == name for each in measured)]
    counts = [sum(each["model"] == name for each in measured) for name in names]
    figure, axes = new_figure(1, len(names), (12.5, 5.6), sharey=True, width_ratios=counts)
    for axis, name in zip(axes[0], names, strict=True):
        _bars(axis, [each for each in measured if each["model"] == name])
        axis.set_title(MODELS[name], fontsize=12, fontweight="bold")
    axes[0][0].set_ylabel("share of what the hardware allows")
    axes[0][0].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes[0][0].set_ylim(0, 1.12)
    handles = [_patch(colour, name) for name, colour in ENGINES.items()]
    handles.append(_patch(LIGHT, "what the hardware allows"))
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.94), ncols=5, frameon=False)
    caption = (
        "Numbers: tokens per second; at the top what measured bandwidth and FLOP/s allow. Random weights, bf16, "
        "greedy, EOS ignored, one NVIDIA H200. Ours: medians of the tables beside this picture. Others (vLLM 0.22.1 "
        "with its defaults, nano-vllm with FlashAttention-3) were measured on the same kind of chip at another time."
    )
    frame(figure, "Throughput on one H200, beside other engines and what the hardware allows", caption)
    return figure


def _bars(axis: Any, measured: list[dict[str, Any]]) -> None:
    width = 0.27
    for group, each in enumerate(measured):
        low, high = each["floor"]
        axis.fill_between([group - 0.46, group + 0.46], low / high if low < high else 0.99, 1.0, color=LIGHT, zorder=1)
        present = [(name, rate) for name, rate in each["engines"].items() if rate is not None]
        for place, (name, rate) in enumerate(present):
            x = group + (place - (len(present) - 1) / 2) * width
            axis.bar(x, rate / high, width * 0.94, color=ENGINES[name], label=name, zorder=2)
            axis.text(
                x, rate / high - 0.012, f"{rate:,.0f}", ha="center", va="top", fontsize=7.5, color="white", zorder=4
            )
        axis.text(group, 1.02, f"{high:,.0f}", ha="center", fontsize=8.5, color=GREY)
    axis.set_xticks(range(len(measured)), [f"{each['workload']}\n{each['counted']}" for each in measured])
    axis.set_xlim(-0.55, len(measured) - 0.45)
    tidy(axis)


def decodes(folder: Path) -> list[dict[str, Any]]:
    """Every measured decode: `engine`, `heads`, `rows`, `context`, `us` and `bytes` of keys and values a layer."""
    columns = {
        "llmkit": ("attention.md", "us a layer"),
        "FlashAttention-3": ("peers.md", "FlashAttention-3, us a layer"),
    }
    found = []
    for engine, (file, column) in columns.items():
        for row in rows_with(folder / file, "rows x context", column):
            rows, context = (int(part) for part in row["rows x context"].split(" x "))
            size = 2 * rows * context * int(row["heads"].split("/")[1]) * HEAD_DIM * BF16
            what = {"engine": engine, "heads": row["heads"], "rows": rows, "context": context}
            found.append(what | {"us": number(row[column]), "bytes": size})
    return found


def prefills(folder: Path) -> dict[str, dict[str, float | None]]:
    """TFLOP/s of every engine by shape."""
    key = "rows x new tokens (+ stored)"
    peers = {(row["heads"], row[key]): row for row in rows_with(folder / "peers.md", key)}
    found: dict[str, dict[str, float | None]] = {}
    for row in rows_with(folder / "attention.md", key, "TFLOP/s"):
        peer = peers.get((row["heads"], row[key]), {})
        rates = {"llmkit": number(row["TFLOP/s"])} | {name: number(peer.get(name, "-")) for name in list(KERNELS)[1:]}
        found[f"{row['heads']}\n{row[key].replace(' (+ 0)', '').replace(' (', chr(10) + '(')}"] = rates
    return found


def copy_bandwidth(folder: Path) -> float:
    """Bytes per second that a copy reads and writes, as measured beside our decodes."""
    said = re.search(r"copy ([\d.]+) TB/s", (folder / "attention.md").read_text(encoding="utf-8"))
    assert said is not None, "attention.md does not say how fast a copy is"
    return float(said[1]) * 1e12


def draw_attention(folder: Path) -> Any:
    """A figure of two panels: bandwidth of decode over the bytes it reads, and TFLOP/s of prefill."""
    figure, axes = new_figure(1, 2, (12.5, 5.8), width_ratios=[1.15, 1])
    _roofline(axes[0][0], decodes(folder), copy_bandwidth(folder))
    _prefill(axes[0][1], prefills(folder))
    handles = [_patch(colour, name) for name, colour in KERNELS.items()]
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.945), ncols=3, frameon=False)
    caption = (
        "One NVIDIA H200, bf16, head dimension 128. Decode in a CUDA graph, storing of new keys and values included "
        "for llmkit; dotted: constant time a layer. Reads alone run faster than a copy, so points may lie above its "
        "line. Others were measured on the same kind of chip at another time; cuDNN attends without pages."
    )
    frame(figure, "Attention on one H200", caption)
    return figure


def _roofline(axis: Any, measured: list[dict[str, Any]], bandwidth: float) -> None:
    sizes = [each["bytes"] / 1e6 for each in measured]
    left, right = min(sizes) / 1.6, max(sizes) * 1.6
    axis.axhline(1.0, color=GREY, linewidth=1.3)
    axis.text(left, 1.02, f" copy, {bandwidth / 1e12:.2f} TB/s", color=GREY, fontsize=9)
    for us in LATENCIES:
        whole = bandwidth * us / 1e12
        reached = [left * (whole / left) ** (step / 60) for step in range(61)]
        axis.plot(reached, [size / whole for size in reached], color=GREY, linewidth=0.9, linestyle=":", zorder=1)
        axis.text(whole * 0.72, 0.72, f"{us} us ", color=GREY, fontsize=8.5, ha="right")
    for each in measured:
        colour, is_filled = KERNELS[each["engine"]], each["heads"] == "32/8"
        share = each["bytes"] / (each["us"] * 1e-6) / bandwidth
        axis.plot(
            each["bytes"] / 1e6, share, MARKERS.get(each["rows"], "v"), markersize=8, markeredgecolor=colour,
            markeredgewidth=1.6, markerfacecolor=colour if is_filled else "white", linestyle="none", zorder=3,
        )  # fmt: skip
    present = {rows: marker for rows, marker in MARKERS.items() if any(each["rows"] == rows for each in measured)}
    shapes = [_marker(marker, f"{rows} row{'s' if rows > 1 else ''}") for rows, marker in present.items()]
    shapes += [_marker("o", "32/8 heads", GREY), _marker("o", "16/8 heads")]
    axis.legend(handles=shapes, loc="lower right", frameon=False, fontsize=9)
    axis.set(xscale="log", xlim=(left, right), ylim=(0, 1.15))
    axis.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set_xlabel("keys and values of all rows, MB a layer")
    axis.set_ylabel("bandwidth over them, share of a copy's")
    axis.set_title("decode", fontsize=12, fontweight="bold")
    tidy(axis)


def _prefill(axis: Any, measured: dict[str, dict[str, float | None]]) -> None:
    width = 0.27
    axis.axhspan(680, 790, color=LIGHT, zorder=0)
    axis.text(-0.5, 735, " bf16 matrix products", color=GREY, fontsize=9, va="center")
    for group, rates in enumerate(measured.values()):
        present = [(name, rate) for name, rate in rates.items() if rate is not None]
        for place, (name, rate) in enumerate(present):
            x = group + (place - (len(present) - 1) / 2) * width
            axis.bar(x, rate, width * 0.94, color=KERNELS[name], zorder=2)
            axis.text(x, rate + 8, f"{rate:.0f}", ha="center", va="bottom", fontsize=8, color=GREY)
    axis.set_xticks(range(len(measured)), list(measured), fontsize=9)
    axis.set(ylim=(0, 830), xlim=(-0.55, len(measured) - 0.45), ylabel="TFLOP/s")
    axis.set_xlabel("heads, rows x new tokens (+ stored)")
    axis.set_title("prefill", fontsize=12, fontweight="bold")
    tidy(axis)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _marker(marker: str, label: str, fill: str = "white") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color="none", markeredgecolor=GREY, markerfacecolor=fill, label=label)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the tables are")
    parser.add_argument("--out", type=Path, help="where the pictures go; default: beside the tables")
    options = parser.parse_args(arguments)
    out = options.out or options.folder
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("throughput", draw_throughput), ("attention", draw_attention)):
        draw(options.folder).savefig(out / f"{name}.png", dpi=110)
        print(out / f"{name}.png")


if __name__ == "__main__":
    main()
