"""Measures the choice of tokens on a GPU in a CUDA graph, against torch's operations; prints a table.

    python -m benchmarks.sampler_gpu > benchmarks/results/h200/sampler.md

Logits are bfloat16 and spread like those of a trained model; between two replays others are touched, so that the caches
are cold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from benchmarks.gpu_time import captured, copy_bandwidth, median_ms
from llmkit.model.sampling.device_sampler import DeviceSampler
from llmkit.model.sampling.draw import block_size_for, draw
from llmkit.model.sampling.nucleus import Filters, draw_filtered
from llmkit.types import SamplingParams

DEVICE, VOCAB_SIZE, ROWS = torch.device("cuda"), 151936, (1, 64, 256)
TOP_P = SamplingParams(temperature=0.8, top_p=0.9)


def captured_us(step: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one step inside a graph, in microseconds, with cold caches."""
    step()
    torch.cuda.synchronize()
    flood = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    return median_ms(captured(step).replay, repeats, before=flood.zero_) * 1e3


def steps(rows: int) -> dict[str, Callable[[], object]]:
    """What is measured for so many rows, by name."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = (torch.randn(rows, VOCAB_SIZE, generator=generator, device=DEVICE) * 3).bfloat16()
    logits[:, :50] += torch.rand(rows, 50, generator=generator, device=DEVICE).bfloat16() * 15
    slots, positions = torch.arange(rows, device=DEVICE), torch.full((rows,), 7, device=DEVICE)
    greedy, drawn, filtered = (DeviceSampler(VOCAB_SIZE, rows, DEVICE) for _ in range(3))
    for slot in range(rows):
        drawn.set_slot(slot, 0.8, slot)
        filtered.set_slot(slot, 0.8, slot, 0, TOP_P.top_p)
    size = block_size_for(VOCAB_SIZE)
    width = -(-VOCAB_SIZE // size) * size
    scaled = torch.full((rows, width), -torch.inf, device=DEVICE)
    noise = torch.rand(2, rows, 1, dtype=torch.float64, device=DEVICE)
    filters = Filters.of([TOP_P] * rows, VOCAB_SIZE, DEVICE)

    def scale() -> torch.Tensor:
        return torch.div(logits, 0.8, out=scaled[:, :VOCAB_SIZE])

    return {
        "greedy": lambda: greedy.choose(logits, slots, positions),
        "greedy, torch's max": lambda: logits.max(dim=-1),
        "temperature": lambda: drawn.choose(logits, slots, positions),
        "temperature, torch": lambda: (scale(), draw(scaled, noise, size, VOCAB_SIZE)),
        "top-p 0.9": lambda: filtered.choose_filtered(logits, slots, positions),
        "top-p 0.9, torch's sort": lambda: (scale(), draw_filtered(scaled, filters, noise[0])),
    }


def main() -> None:
    bandwidth = copy_bandwidth()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    print(f"# Choosing tokens on {torch.cuda.get_device_name()}\n\n{versions}; {VOCAB_SIZE} logits a row in bf16.\n")
    print("Command: `python -m benchmarks.sampler_gpu`\n")
    print(f"Copy {bandwidth / 1e12:.2f} TB/s.\n")
    print("| rows | what | us | us of one read at copy bandwidth |\n|---|---|---|---|")
    for rows in ROWS:
        floor = rows * VOCAB_SIZE * 2 / bandwidth * 1e6
        for name, step in steps(rows).items():
            print(f"| {rows} | {name} | {captured_us(step):.1f} | {floor:.1f} |", flush=True)


if __name__ == "__main__":
    main()
