"""Each scheduler against first come, first served on the workload it is made for, on the simulated clock.

python -m benchmarks.schedulers             # all: pictures to docs/schedulers/, table to docs/schedulers.md
python -m benchmarks.schedulers sjf         # simulate one and print its rows

The engine, scheduler and cache are real, the tokens are made up, and a step takes `STEP + PER_TOKEN * tokens` seconds:
about what the embedded model takes on two CPU cores (README). So every figure is the same on every machine.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.scheduler_panels import (
    BASELINE,
    Panel,
    Run,
    bars,
    by_output_length,
    by_tenant,
    colour,
    lateness,
    p95,
    shares,
    sweep,
    ttfts,
)
from llmkit.interfaces.cache import CacheSpec
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.summary import summarise
from llmkit.plugins import load_plugins
from llmkit.registry import Registry
from llmkit.report.style import frame, new_figure, tidy
from llmkit.testing.simulation import simulate
from llmkit.types import SamplingParams, StepPlan
from llmkit.workload.driver import run_workload
from llmkit.workload.protocol import ModelBounds

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: begin (written by benchmarks/schedulers.py) -->", "<!-- results: end -->"
STEP, PER_TOKEN = 1.5e-3, 0.1e-3


@dataclass(frozen=True)
class Comparison:
    """What is played, what counts, and the two panels that show it."""

    scheduler: str
    workload: str
    metrics: Mapping[str, Callable[[Run], float]]
    panels: Sequence[Panel]
    heading: str
    num_blocks: int = 1024
    options: Mapping[str, Any] = field(default_factory=lambda: {"max_num_seqs": 8})


def step_seconds(plan: StepPlan) -> float:
    """How long a step takes."""
    return STEP + PER_TOKEN * plan.num_tokens


@cache
def registry() -> Registry:
    """Every installed component."""
    return load_plugins()[0]


def play(comparison: Comparison, scheduler: str, **workload: Any) -> Run:
    """Play the comparison's workload, with options changed by `workload`, with `scheduler`; same every time."""
    chosen, paged = (registry().get(*name).load() for name in (("scheduler", scheduler), ("cache", "paged")))
    blocks = paged(paged.Settings(), CacheSpec(comparison.num_blocks, 16))
    target = simulate(chosen(chosen.Settings(**comparison.options)), blocks, step_seconds)
    component = registry().get("workload", comparison.workload)
    bounds = ModelBounds(target.engine.limits.vocab_size, target.engine.limits.max_model_len, target.encode)
    requests = component.load()(component.settings(**workload)).build(bounds)
    recorder = MetricsRecorder()
    run_workload(target, requests, SamplingParams(temperature=0.0, ignore_eos=True), recorder)
    return Run(scheduler, requests, recorder, summarise(recorder))


def compare(comparison: Comparison, **workload: Any) -> list[Run]:
    """The baseline, then the scheduler."""
    return [play(comparison, scheduler, **workload) for scheduler in (BASELINE, comparison.scheduler)]


def number(key: str) -> Callable[[Run], float]:
    """A metric that `result.json` has."""
    return lambda run: run.numbers[key]


def shown(value: float) -> str:
    """With one decimal place, but for counts."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def lighter_tenants(run: Run) -> float:
    """Mean time to first token of everybody but the heaviest tenant, ms."""
    return fmean(1e3 * (record.ttft or 0.0) for record in run.completed if record.tenant != "tenant0")


def deadlines_met(run: Run) -> float:
    """Per cent of the requests."""
    return 100 * float(run.numbers["deadlines_met"])


def hit_rate(run: Run) -> float:
    """Per cent of the prompt tokens."""
    return 100 * float(run.numbers["prefix_hit_rate"])


COMPARISONS = {
    "sjf": Comparison(
        "sjf",
        "short_long",
        {"mean e2el, ms": number("mean_e2el_ms"), "mean ttft, ms": number("mean_ttft_ms")},
        (
            shares("end-to-end latency, ms (log scale)", lambda run: [1e3 * (r.e2el or 0.0) for r in run.completed]),
            bars("output tokens of the request", "mean end-to-end latency, ms", by_output_length),
        ),
        "sjf: short answers no longer queue behind long ones",
    ),
    "fair": Comparison(
        "fair",
        "tenants",
        {
            "mean ttft of the three lighter tenants, ms": lighter_tenants,
            "mean ttft of all, ms": number("mean_ttft_ms"),
        },
        (
            bars("tenant and its share of the requests", "mean time to first token, ms", by_tenant(fmean)),
            bars("tenant and its share of the requests", "95th percentile of time to first token, ms", by_tenant(p95)),
        ),
        "fair: who asks for less than its share does not feel who asks for more",
    ),
    "deadline": Comparison(
        "deadline",
        "deadlines",
        {"deadlines met, %": deadlines_met, "requests completed": number("completed")},
        (
            sweep(
                "requests per second",
                "deadlines met, % of all requests",
                deadlines_met,
                (20, 40, 60, 80, 120, 160),
                lambda scheduler, rate: play(COMPARISONS["deadline"], scheduler, rate=rate),
            ),
            lateness,
        ),
        "deadline: what cannot end in time is refused, so that the others do",
    ),
    "prefix_aware": Comparison(
        "prefix_aware",
        "shared_prefixes",
        {"prompt tokens found in the cache, %": hit_rate, "mean ttft, ms": number("mean_ttft_ms")},
        (
            sweep(
                "KV blocks (32 prefixes take 512 of them)",
                "prompt tokens found in the cache, %",
                hit_rate,
                (192, 256, 384, 512, 768),
                lambda scheduler, size: play(replace(COMPARISONS["prefix_aware"], num_blocks=size), scheduler),
            ),
            shares("time to first token, ms (log scale)", ttfts),
        ),
        "prefix_aware: who begins alike runs together, while the prefix is still cached",
        num_blocks=256,
    ),
}


def picture(comparison: Comparison, runs: Sequence[Run]) -> bytes:
    """A PNG of both panels."""
    from matplotlib.lines import Line2D

    figure, axes = new_figure(1, 2, (11.0, 4.8))
    for panel, draw in zip(axes[0], comparison.panels, strict=True):
        draw(panel, runs)
        tidy(panel)
    metrics = "; ".join(
        f"{name} {', '.join(f'{shown(value(run))} ({run.scheduler})' for run in runs)}"
        for name, value in comparison.metrics.items()
    )
    options = ", ".join(f"{key}={value}" for key, value in comparison.options.items())
    caption = (
        f"Simulated: workload {comparison.workload} ({len(runs[0].requests)} requests), {options}, "
        f"{comparison.num_blocks} blocks of 16 tokens; a step takes {STEP * 1e3:g} ms and {PER_TOKEN * 1e3:g} ms a "
        f"token. {metrics}. python -m benchmarks.schedulers"
    )
    frame(figure, comparison.heading, caption)
    handles = [Line2D([], [], color=colour(run), linewidth=4) for run in runs]
    names = [run.scheduler for run in runs]
    figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.925), ncols=2, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def rows(comparison: Comparison, runs: Sequence[Run]) -> list[str]:
    """Table rows: one a metric."""
    before, after = runs
    chosen = f"`{comparison.scheduler}` | `{comparison.workload}`"
    return [
        f"| {chosen} | {name} | {shown(value(before))} | {shown(value(after))} |"
        for name, value in comparison.metrics.items()
    ]


def write(table: Sequence[str], pictures: Mapping[str, bytes], root: Path) -> None:
    """Put the table between the page's markers, and the pictures beside it."""
    page = root / "docs" / "schedulers.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{page.name} has no markers"
    page.write_text("\n".join([f"{before}{BEGIN}", *table, f"{END}{after}"]), encoding="utf-8")
    for name, png in pictures.items():
        (root / "docs" / "schedulers").mkdir(exist_ok=True)
        (root / "docs" / "schedulers" / f"{name}.png").write_bytes(png)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these, printed; without: all of them, written")
    names = parser.parse_args(arguments).names
    table = [f"| scheduler | workload | metric | `{BASELINE}` | the scheduler |", "|---|---|---|---:|---:|"]
    pictures = {}
    for name in names or COMPARISONS:
        runs = compare(COMPARISONS[name])
        table += rows(COMPARISONS[name], runs)
        pictures[name] = picture(COMPARISONS[name], runs)
    print("\n".join(table))
    if not names:
        write(table, pictures, root)


if __name__ == "__main__":
    main()
