"""Measures decode attention over shared prefixes and over keys in e4m3 on a GPU, by CUDA graphs; writes two tables.

    python -m benchmarks.shared_prefix_gpu --out benchmarks/results/h200/shared_prefix.md

Every layer has keys and values of its own, enough of them to leave the caches; times include storing the new ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton

from benchmarks.attention_gpu import BLOCK, DEVICE, DIM, HEADS, batch, take_region
from benchmarks.gpu_time import captured, copy_bandwidth, median_ms
from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements, LayerSpec
from llmkit_attention.flash.backend import FlashAttention
from llmkit_attention.flash.settings import FlashSettings

PREFIX = 2048
SHARED = [(rows, own) for rows in (64, 256) for own in (128, 512)]
NARROW = [(64, 8192), (256, 2048)]
REPEATS = 20


def sharing(step: AttentionBatch, prefix: int) -> AttentionBatch:
    """`step` with rows that all begin with the first one's blocks."""
    blocks, rows = prefix // BLOCK, len(step.seq_lens)
    table = step.block_table.clone()
    table[:, :blocks] = table[:1, :blocks]
    return replace(step, block_table=table, num_repeated_keys=(rows - 1) * prefix)


def decode_us(spec: LayerSpec, step: AttentionBatch, kv_dtype: str = "auto") -> tuple[float, float]:
    """Medians inside CUDA graphs: microseconds of a layer of `step`, and of planning it once."""
    num_blocks = int(step.block_table.max()) + 1
    settings = FlashSettings.model_validate({"kv_dtype": kv_dtype})
    size = FlashAttention(
        settings, AttentionRequirements("cuda", "bfloat16", BLOCK, (spec,)), torch.bfloat16, DEVICE
    ).bytes_per_block()
    num_layers = max(2, min(64, (2 << 30) // (size * num_blocks)))
    requirements = AttentionRequirements("cuda", "bfloat16", BLOCK, (spec,) * num_layers)
    backend = FlashAttention(settings, requirements, torch.bfloat16, DEVICE)
    backend.allocate(num_blocks)
    for pool in backend._pools:
        pool.copy_(torch.randn(pool.shape, device=DEVICE, dtype=torch.bfloat16))
    shape = (len(step.positions), spec.num_heads + 2 * spec.num_kv_heads, DIM)
    merged = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    query, key, value = merged.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)

    def run() -> None:
        for layer in range(num_layers):
            backend.forward(layer, query, key, value)

    backend.plan(step)
    run()
    torch.cuda.synchronize()
    layers, plan = replayed_us(run), replayed_us(lambda: backend.plan(step))
    return layers / num_layers, plan


def replayed_us(run: Callable[[], None]) -> float:
    """Median over replays of `run` in a graph."""
    return median_ms(captured(run).replay, REPEATS) * 1e3


def shared_rows(kv_dtype: str) -> list[str]:
    """Lines of the table of shared prefixes."""
    lines = []
    for heads, kv_heads in HEADS:
        spec = LayerSpec(heads, kv_heads, DIM, DIM**-0.5)
        for rows, own in SHARED:
            step = sharing(batch(rows, 1, PREFIX + own - 1), PREFIX)
            apart, once = (decode_us(spec, replace(step, num_repeated_keys=n), kv_dtype) for n in (0, 1 << 40))
            name = f"| {heads}/{kv_heads} | {kv_dtype} | {rows} x ({PREFIX} + {own})"
            plans = f"{apart[1]:.1f} | {once[1]:.1f}"
            lines.append(f"{name} | {apart[0]:.1f} | {once[0]:.1f} | {apart[0] / once[0]:.2f}x | {plans} |")
            print(lines[-1], flush=True)
    return lines


def narrow_rows() -> list[str]:
    """Lines of the table of keys in e4m3."""
    lines = []
    for heads, kv_heads in HEADS:
        spec = LayerSpec(heads, kv_heads, DIM, DIM**-0.5)
        for rows, context in NARROW:
            step = batch(rows, 1, context - 1)
            wide, narrow = (decode_us(spec, step, kv_dtype)[0] for kv_dtype in ("auto", "fp8"))
            keys = rows * context * kv_heads * DIM
            rates = f"{4 * keys / wide / 1e3:.0f} | {2 * keys / narrow / 1e3:.0f}"
            name = f"| {heads}/{kv_heads} | {rows} x {context}"
            lines.append(f"{name} | {wide:.1f} | {narrow:.1f} | {rates} | {wide / narrow:.2f}x |")
            print(lines[-1], flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the tables here")
    options = parser.parse_args(arguments)
    take_region()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    lines = [
        f"# Shared prefixes and keys in e4m3: attention backend `flash` on {torch.cuda.get_device_name()}\n",
        f"{versions}; queries in bf16, blocks of {BLOCK}, head dimension {DIM};",
        f"copy {copy_bandwidth() / 1e12:.2f} TB/s.",
        f"Medians of {REPEATS} replays. Command: `python -m benchmarks.shared_prefix_gpu`\n",
        "| heads | keys | rows x (shared + own) | us a layer, every row for itself | read once | speedup "
        "| us of a plan, every row for itself | read once |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        *(line for kv_dtype in ("auto", "fp8") for line in shared_rows(kv_dtype)),
        "\n| heads | rows x context | bf16, us a layer | e4m3 | bf16, GB/s | e4m3 | speedup |",
        "|---|---|---:|---:|---:|---:|---:|",
        *narrow_rows(),
    ]
    print("\n".join(lines))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
