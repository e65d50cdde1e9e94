"""Measures the attention backend `flash` on a GPU by CUDA graphs of several layers; prints tables.

    python -m benchmarks.attention_gpu > benchmarks/results/h200/attention.md

Every layer has keys and values of its own, enough of them to leave the caches; times include storing the new ones.
All lie in one region that is taken first, as an engine's do: memory that a process has given back and got again is read
up to 13 % more slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import triton

from benchmarks.gpu_time import captured, copy_bandwidth, median_ms
from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements, LayerSpec
from llmkit_attention.flash.backend import FlashAttention

DEVICE, BLOCK, DIM = torch.device("cuda"), FlashAttention.preferred_block_size, 128
HEADS = [(16, 8), (32, 8)]
DECODES = [(rows, context) for rows in (1, 8, 64, 256) for context in (512, 2048, 8192, 32768)]
UNEVEN = {
    "200 of 100 to 2000": [100 + 1900 * row // 199 for row in range(200)],
    "63 of 300, 1 of 30000": [300] * 63 + [30_000],
}
"""Decode steps of rows with contexts of their own."""
PREFILLS = [
    (16, 8, 32, 512, 0),
    (32, 8, 16, 1024, 0),
    (32, 8, 4, 8192, 0),
    (32, 8, 1, 16384, 0),
    (32, 8, 1, 8192, 8192),
]
"""(query heads, KV heads, rows, new tokens of each, tokens each has stored before)."""
REGION = 72 << 30
"""Bytes of the region: two layers of the largest decode, and what is needed beside them."""


def batch(rows: int, new: int, stored: int) -> AttentionBatch:
    """Rows of one shape over blocks in random order."""
    return batch_of([(new, stored)] * rows)


def batch_of(rows: Sequence[tuple[int, int]]) -> AttentionBatch:
    """Rows of so many new tokens after so many stored ones each, over blocks in random order."""
    lengths = [new + stored for new, stored in rows]
    blocks = [-(-length // BLOCK) for length in lengths]
    table = torch.zeros(len(rows), max(blocks), device=DEVICE, dtype=torch.int32)
    numbers = torch.randperm(sum(blocks), device=DEVICE, dtype=torch.int32).split(blocks)
    positions, slots = [], []
    for row, ((_, stored), length, own) in enumerate(zip(rows, lengths, numbers, strict=True)):
        table[row, : len(own)] = own
        positions.append(torch.arange(stored, length, device=DEVICE))
        slots.append(own[positions[-1] // BLOCK].long() * BLOCK + positions[-1] % BLOCK)
    starts = torch.tensor([0, *accumulate(new for new, _ in rows)], dtype=torch.int32, device=DEVICE)
    return AttentionBatch(
        starts,
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        torch.cat(positions),
        table,
        torch.cat(slots),
        max(new for new, _ in rows),
        max(lengths),
        tuple(new for new, _ in rows),
        tuple(lengths),
    )


def prepared(spec: LayerSpec, step: AttentionBatch, num_layers: int) -> Callable[[], None]:
    """A step of `num_layers` layers, warmed up."""
    requirements = AttentionRequirements("cuda", "bfloat16", BLOCK, (spec,) * num_layers)
    backend = FlashAttention(FlashAttention.Settings(), requirements, torch.bfloat16, DEVICE)
    backend.allocate(step.block_table.numel())
    for pool in backend._pools:
        pool.normal_()
    shape = (len(step.positions), spec.num_heads + 2 * spec.num_kv_heads, DIM)
    merged = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    query, key, value = merged.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    backend.plan(step)

    def run() -> None:
        for layer in range(num_layers):
            backend.forward(layer, query, key, value)

    run()
    torch.cuda.synchronize()
    return run


def us_of_layer(spec: LayerSpec, step: AttentionBatch) -> float:
    """Microseconds a layer of one step takes inside a CUDA graph, storing the new keys included."""
    size = 4 * sum(step.host_seq_lens) * spec.num_kv_heads * DIM
    num_layers = max(2, min(64, (1 << 30) // size))
    run = prepared(spec, step, num_layers)
    return median_ms(captured(run).replay) * 1e3 / num_layers


def take_region() -> None:
    """Leave a region to torch's allocator, which cuts from it whatever comes now."""
    free, _ = torch.cuda.mem_get_info()
    torch.empty(min(REGION, int(0.9 * free)), dtype=torch.uint8, device=DEVICE)


def main() -> None:
    take_region()
    bandwidth = copy_bandwidth()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    print(
        f"# Attention backend `flash` on {torch.cuda.get_device_name()}\n\n{versions}; bf16, blocks of {BLOCK}, ",
        end="",
    )
    print(f"head dimension {DIM}; copy {bandwidth / 1e12:.2f} TB/s.\n\nCommand: `python -m benchmarks.attention_gpu`")
    even = {f"{rows} x {context}": [context] * rows for rows, context in DECODES}
    for title, decodes in (("rows x context", even), ("rows and contexts", UNEVEN)):
        print(f"\n| heads | {title} | us a layer | us of its bytes at copy bandwidth | % |\n|---|---|---|---|---|")
        for heads, kv_heads in HEADS:
            for name, contexts in decodes.items():
                step = batch_of([(1, context - 1) for context in contexts])
                took = us_of_layer(LayerSpec(heads, kv_heads, DIM, DIM**-0.5), step)
                floor = 4 * sum(contexts) * kv_heads * DIM / bandwidth * 1e6
                row = f"| {heads}/{kv_heads} | {name} | {took:.1f} | {floor:.1f} | {100 * floor / took:.0f} |"
                print(row, flush=True)
    print("\n| heads | rows x new tokens (+ stored) | ms a layer | TFLOP/s |\n|---|---|---|---|")
    for heads, kv_heads, rows, new, stored in PREFILLS:
        took = us_of_layer(LayerSpec(heads, kv_heads, DIM, DIM**-0.5), batch(rows, new, stored)) / 1e3
        flops = 4 * heads * DIM * rows * (new * stored + new * (new + 1) / 2)
        print(
            f"| {heads}/{kv_heads} | {rows} x {new} (+ {stored}) | {took:.3f} | {flops / took / 1e9:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
