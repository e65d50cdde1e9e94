"""The least time in which a GPU can serve a batch: every weight, key and value is read once a step at the bandwidth of
a copy, or every product takes its time at the rate of a large one, whichever is longer.

A decode step of B rows takes max(weight bytes / bandwidth, 2 x weights x B / FLOP/s) + all context x KV bytes a token /
bandwidth; prompts take their products and attention. All rows decode together, whatever limits the engine has. Windows
and experts that are not asked are not taken off, so it is a floor for dense models without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_time import copy_bandwidth, product_flops
from llmkit import LLM


@dataclass(frozen=True, slots=True)
class Device:
    """`bandwidth`: bytes read and written a second by a copy; `flops`: of a large product, a second."""

    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class Work:
    """`weights`: numbers that every step multiplies by, `weight_bytes` of them; `kv_bytes` a token takes in all layers;
    `pair_flops`: what attention of a query to one key takes in all layers."""

    weights: int
    weight_bytes: int
    kv_bytes: float
    pair_flops: int


def floor_seconds(lengths: Sequence[tuple[int, int]], work: Work, device: Device) -> float:
    """Least time for requests of so many prompt and output tokens each."""
    num_in = sum(prompt for prompt, _ in lengths)
    pairs = sum(prompt * (prompt + 1) / 2 for prompt, _ in lengths)
    seconds = (2 * work.weights * num_in + work.pair_flops * pairs) / device.flops
    for step in range(1, max(output for _, output in lengths)):
        contexts = [prompt + step for prompt, output in lengths if output > step]
        products = 2 * work.weights * len(contexts) / device.flops
        seconds += max(work.weight_bytes / device.bandwidth, products)
        seconds += sum(contexts) * work.kv_bytes / device.bandwidth
    return seconds


def work_of(llm: LLM) -> Work:
    """What a token of this model takes. The embedding counts where it is the head as well."""
    module: Any = llm.model.module
    embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings()
    read = [p for p in module.parameters() if p is not embedding or (head is not None and head.weight is embedding)]
    layers = llm.attention.requirements.layers
    return Work(
        weights=sum(parameter.numel() for parameter in read),
        weight_bytes=sum(parameter.nbytes for parameter in read),
        kv_bytes=llm.attention.bytes_per_block() / llm.attention.requirements.block_size,
        pair_flops=sum(4 * layer.num_heads * layer.head_dim for layer in layers),
    )


def measured_device() -> Device:
    """The current GPU."""
    device = Device(copy_bandwidth(), product_flops())
    torch.cuda.empty_cache()
    return device
