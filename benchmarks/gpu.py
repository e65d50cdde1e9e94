"""Throughput of the named GPU workloads: every run through `LLM.generate`, medians, one table.

python -m benchmarks.gpu --model qwen3_0_6b nano256 single batch64
python -m benchmarks.gpu --model llama_8b --max-num-seqs 512 single mixed512:1 --out llama_8b.md

"Floor" is the least time that this GPU's bandwidth and products allow (`benchmarks.floor`), "reached" its part of ours.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.floor import Device, floor_seconds, measured_device, work_of
from llmkit import LLM, SamplingParams
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.summary import summarise
from llmkit.workload.named import WORKLOADS

Inputs = tuple[list[list[int]], list[SamplingParams]]
"""Token ids of prompts, and what is asked of each."""


def inputs_of(workload: str) -> Inputs:
    """Its requests, seed 0, as `LLM.generate` takes them."""
    requests = WORKLOADS[workload](0)
    params = [SamplingParams(max_tokens=r.max_tokens, temperature=0.0, ignore_eos=True) for r in requests]
    return [list(r.prompt_token_ids) for r in requests], params


def timed(llm: LLM, inputs: Inputs) -> float:
    """Seconds from the first prompt queued to the last token of one run."""
    started = time.perf_counter()
    outputs = llm.generate(*inputs)
    seconds = time.perf_counter() - started
    lengths = [len(output.token_ids) for output in outputs]
    assert lengths == [params.max_tokens for params in inputs[1]], "a request ended early"
    return seconds


def measure(llm: LLM, workload: str, runs: int, device: Device | None = None) -> str:
    """A table row: the median of `runs` after one that is not counted, what one more shows of host and device, and what
    `device` would allow."""
    inputs = inputs_of(workload)
    lengths = [(len(prompt), params.max_tokens or 0) for prompt, params in zip(*inputs, strict=True)]
    num_in, num_out = map(sum, zip(*lengths, strict=True))
    timed(llm, inputs)
    times = [timed(llm, inputs) for _ in range(runs)]
    seconds = statistics.median(times)
    spread = (max(times) - min(times)) / seconds
    rates = f"{num_out / seconds:,.0f} | {num_in / seconds:,.0f} | {spread:.1%}"
    row = f"| {workload} | {runs} | {num_in:,} / {num_out:,} | {seconds:.2f} | {rates} | {observed(llm, inputs)} | "
    if device is None:
        row += "- | - |"
    else:
        floor = floor_seconds(lengths, work_of(llm), device)
        row += f"{floor:.2f} | {floor / seconds:.0%} |"
    print(row, flush=True)
    return row


def observed(llm: LLM, inputs: Inputs) -> str:
    """Host time per step in us, and the share of a run in which the device had no step to work on."""
    recorder, now = MetricsRecorder(), llm.engine.clock.now
    llm.plugin_manager.register(recorder)
    recorder.start(now())
    timed(llm, inputs)
    recorder.stop(now())
    llm.plugin_manager.unregister(recorder)
    result = summarise(recorder, device=llm.model.device.type)
    idle = "-" if result["gpu_idle"] is None else f"{result['gpu_idle']:.1%}"
    return f"{result['host_us_per_step']:.0f} | {idle}"


def network_of(llm: LLM) -> str:
    """Which layers run: one that is slow may be so because they were not fused, or not captured."""
    executor: Any = llm.engine.executor
    return f"{type(executor.network).__name__}, {'graphs' if executor.graphs else 'no graphs'}"


def asked(text: str) -> tuple[str, int]:
    """A workload and how often it is timed."""
    workload, _, runs = text.partition(":")
    if workload not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"{workload!r} is none of {', '.join(sorted(WORKLOADS))}")
    return workload, int(runs or 3)


def title(llm: LLM, options: argparse.Namespace, limits: Any, loaded: float, device: Device) -> list[str]:
    """What was measured on what, and the head of the table. `loaded`: seconds it took to build the engine."""
    stored = f", keys and values in {options.kv_dtype}" if options.kv_dtype else ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return [
        f"# {options.model}: random weights, bf16, greedy, EOS ignored",
        "",
        f"{torch.cuda.get_device_name()}; {versions}; attention={options.attention}{stored},",
        f"blocks of {llm.attention.requirements.block_size}, no prefix caching, {limits},",
        f"max_model_len {options.max_model_len}, {network_of(llm)};",
        f"medians of so many runs after one warm-up; built in {loaded:.1f} s; copy {device.bandwidth / 1e12:.2f} TB/s,",
        f"product of 8192 x 8192 numbers by as many {device.flops / 1e12:.0f} TFLOP/s.",
        "",
        "| workload | runs | tokens in / out | seconds | output tok/s | input tok/s | spread "
        "| host us/step | device idle | floor, s | reached |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("workloads", nargs="+", type=asked, metavar="workload[:runs]", help=", ".join(sorted(WORKLOADS)))
    add("--model", default="qwen3_0_6b")
    add("--max-num-seqs", type=int, default=256)
    add("--max-num-batched-tokens", type=int, default=16384)
    add("--max-model-len", type=int, default=8704)
    add("--attention", default="flash")
    add("--kv-dtype", choices=["auto", "fp8"], help="how `flash` stores keys and values")
    add("--out", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    device = measured_device()
    limits = {"max_num_seqs": options.max_num_seqs, "max_num_batched_tokens": options.max_num_batched_tokens}
    started = time.perf_counter()
    llm = LLM(
        options.model,
        {"name": "continuous", **limits},
        {"name": "paged", "prefix": False},  # every run has the same prompts
        attention={"name": options.attention} | ({"kv_dtype": options.kv_dtype} if options.kv_dtype else {}),
        max_model_len=options.max_model_len,
    )
    lines = title(llm, options, limits, time.perf_counter() - started, device)
    lines += [measure(llm, workload, runs, device) for workload, runs in options.workloads]
    print("\n".join(lines))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
