"""Where the time of a decode step goes: torch's profiler over one replay of its CUDA graph, by kind of kernel; a table.

    python -m benchmarks.profile_gpu 1x512 64x512
    python -m benchmarks.profile_gpu --model llama_8b 64x512 --kernels

Rows x context: so many rows decode their next token behind that many. Kernels that wait for the one in front of them
count the time that they wait, so the parts may be more than the replay, which is timed without the profiler.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llmkit import LLM, SamplingParams
from llmkit.types import Admission, BlockTableEdit, ScheduledRequest, StepPlan

Kernels = list[tuple[str, float]]
"""Name and microseconds, in the order in which they started."""
ATTENTION, PRODUCTS, BETWEEN = (
    "attention over the keys",
    "products, split-K reductions included",
    "norms, rotation with store, activation, sums",
)
HEAD, REST = "head and choice of tokens", "the rest"
KINDS = {
    HEAD: ("weigh_blocks", "choose", "choose_filtered"),
    ATTENTION: (
        *("list_tiles", "attend_one", "list_queries", "list_longest_first", "attend_many", "attend_shared"),
        *("choose_pages", "find_prefixes", "list_packs", "flash", "fmha", "BatchDecode", "PagedKV"),
    ),
    PRODUCTS: (
        *("_multiply_rows", "_multiply_tiles", "_multiply_experts", "_route", "_list_members"),
        *("gemm", "gemv", "splitK", "nvjet", "cutlass", "cublas"),
    ),
    BETWEEN: (
        *("_add_rms_norm", "_norm_and_rotate", "_activate_and_multiply", "write_kv", "_sum_of_places"),
        *("rms_norm", "RMSNorm", "layer_norm"),
    ),
}
"""Kernels of ours by their names, those of libraries by what theirs contain."""


def kind_of(name: str) -> str:
    """The kind of a kernel: ours by name, others by what their names contain."""
    for kind, names in KINDS.items():
        if name in names:
            return kind
    parts = ((kind, part) for kind, names in KINDS.items() if kind != HEAD for part in names if part[0] != "_")
    return next((kind for kind, part in parts if part in name), REST)


def by_kind(kernels: Kernels) -> dict[str, float]:
    """Microseconds of each kind. The head is the last product, and what follows it."""
    kinds = [kind_of(name) for name, _ in kernels]
    if HEAD in kinds:
        start = kinds.index(HEAD)
        while start and PRODUCTS in kinds[:start] and kinds[start] != PRODUCTS:
            start -= 1
        while start and kinds[start - 1] == PRODUCTS:
            start -= 1
        kinds[start:] = [HEAD] * (len(kinds) - start)
    took = dict.fromkeys((ATTENTION, PRODUCTS, BETWEEN, HEAD, REST), 0.0)
    for kind, (_, microseconds) in zip(kinds, kernels, strict=True):
        took[kind] += microseconds
    return took


def kernels_of(trace: dict[str, Any]) -> Kernels:
    """What ran on the device, from a trace in Chrome's format."""
    on_device = [e for e in trace["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return [(event["name"], float(event["dur"])) for event in sorted(on_device, key=lambda event: event["ts"])]


def profiled(run: Callable[[], object]) -> Kernels:
    """Kernels of one `run`, behind one that does not count."""
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            run()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text(encoding="utf-8")))


def mean_us(run: Callable[[], object], repeats: int) -> float:
    """Time of one of `repeats` runs that the host queues one behind the other, as it does one step ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def decode_plan(llm: LLM, rows: int, context: int) -> StepPlan:
    """Compute `context - 1` random tokens for each of `rows` slots; returns the step that decodes behind the last ones.

    SystemExit if the pool holds less.
    """
    executor, spec = llm.engine.executor, llm.engine.planner.allocator.spec
    per_row = -(-(context + 1) // spec.block_size)
    if rows * per_row > spec.num_blocks:
        raise SystemExit(f"{rows}x{context} takes {rows * per_row} KV blocks, the pool has {spec.num_blocks}")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(spec.num_blocks, generator=generator)[: rows * per_row].view(rows, per_row).tolist()
    tokens = torch.randint(llm.model.architecture.vocab_size, (rows, context), generator=generator).tolist()
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    for slot in range(rows):
        admission = Admission(slot, str(slot), tuple(tokens[slot]), context, greedy, 0)
        edit = BlockTableEdit(slot, 0, tuple(blocks[slot]))
        prompt = ScheduledRequest(str(slot), slot, 0, context - 1, False, 0)
        executor.launch(StepPlan(slot, (prompt,), (admission,), (edit,))).wait()
    return StepPlan(rows, tuple(ScheduledRequest(str(slot), slot, context - 1, 1, True, 0) for slot in range(rows)))


def measure(llm: LLM, rows: int, context: int, repeats: int) -> tuple[Kernels, float]:
    """Kernels of one replay of such a step, and the time of a replay in microseconds, taken before it is profiled."""
    plan, executor = decode_plan(llm, rows, context), llm.engine.executor
    graphs: Any = getattr(executor, "graphs", None)
    if graphs is None or not graphs.takes(plan):
        raise SystemExit("this model's steps are not captured, so there is nothing to replay (see the log)")
    executor.launch(plan).wait()  # captures
    with torch.inference_mode():
        took = mean_us(lambda: graphs.run(plan), repeats)
        return profiled(lambda: graphs.run(plan)), took


def table(shapes: Sequence[tuple[int, int]], results: Sequence[tuple[Kernels, float]]) -> list[str]:
    """Lines of a Markdown table: kinds against shapes, and the whole replay."""
    kinds = [by_kind(kernels) for kernels, _ in results]
    rows = [(kind, [took[kind] for took in kinds]) for kind in kinds[0]]
    rows.append(("replay", [microseconds for _, microseconds in results]))
    head = [f"{rows} {'row' if rows == 1 else 'rows'} of {context}" for rows, context in shapes]
    lines = [f"| us of a replay | {' | '.join(head)} |", "|---|" + "---:|" * len(shapes)]
    return lines + [f"| {name} | {' | '.join(f'{value:,.0f}' for value in values)} |" for name, values in rows]


def by_name(kernels: Kernels) -> list[str]:
    """Lines of a Markdown table: every kernel, its kind, how often it ran, and its microseconds in all, most first."""
    took: defaultdict[str, list[float]] = defaultdict(list)
    for name, microseconds in kernels:
        took[name].append(microseconds)
    rows = sorted(took.items(), key=lambda item: -sum(item[1]))
    return ["| kernel | kind | launches | us |", "|---|---|---:|---:|"] + [
        f"| {name[:80].replace('|', ' ')} | {kind_of(name)} | {len(each)} | {sum(each):,.1f} |" for name, each in rows
    ]


def shape_of(text: str) -> tuple[int, int]:
    """Rows and context of "64x512"."""
    rows, context = map(int, text.split("x"))
    if rows < 1 or context < 2:
        raise ValueError(text)
    return rows, context


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shapes", nargs="+", type=shape_of, metavar="ROWSxCONTEXT", help="such as 64x512")
    add("--model", default="qwen3_0_6b")
    add("--attention", default="flash")
    add("--repeats", type=int, default=20, help="replays that are timed")
    add("--kernels", action="store_true", help="also list every kernel by name")
    add("--out", type=Path, help="also write the tables here")
    options = parser.parse_args(arguments)
    most_rows, longest = (max(column) for column in zip(*options.shapes, strict=True))
    scheduler = {"name": "continuous", "max_num_seqs": most_rows, "max_num_batched_tokens": max(longest, most_rows)}
    llm = LLM(options.model, scheduler, attention=options.attention, device="cuda", max_model_len=longest + 1)
    results = [measure(llm, rows, context, options.repeats) for rows, context in options.shapes]
    command = " ".join(["python -m benchmarks.profile_gpu", *(sys.argv[1:] if arguments is None else arguments)])
    lines = [
        f"# A decode step of {options.model}\n",
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}; attention={options.attention}; random weights in",
        f"{llm.model.dtype}, greedy. Kinds: one profiled replay; replay: mean of {options.repeats}.",
        f"Command: `{command}`\n",
        *table(options.shapes, results),
    ]
    for (rows, context), (kernels, _) in zip(options.shapes, results if options.kernels else (), strict=False):
        lines += [f"\n{rows} x {context}, {len(kernels)} kernels:\n", *by_name(kernels)]
    print("\n".join(lines))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
