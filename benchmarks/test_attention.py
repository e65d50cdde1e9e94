"""One layer of attention on a CPU: decode steps by rows and context, prompts by length, and planning a step."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements, LayerSpec
from llmkit_attention.sdpa import SdpaAttention

CPU, BLOCK_SIZE = torch.device("cpu"), 16
SPEC = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125)
"""A layer of the embedded model."""
DTYPES = [torch.float32, torch.bfloat16]


class Step:
    """`num_rows` sequences of `context` tokens in scattered blocks, of which the last `num_new` are this step's."""

    def __init__(self, dtype: torch.dtype, num_rows: int, context: int, num_new: int) -> None:
        name, width = str(dtype).removeprefix("torch."), -(-context // BLOCK_SIZE)
        requirements = AttentionRequirements("cpu", name, BLOCK_SIZE, (SPEC,))
        self.backend = SdpaAttention(SdpaAttention.Settings(), requirements, dtype, CPU)
        self.backend.allocate(num_rows * width)
        generator = torch.Generator().manual_seed(0)
        table = torch.randperm(num_rows * width, generator=generator).view(num_rows, width)
        positions = torch.arange(context - num_new, context).repeat(num_rows)
        owners = torch.arange(num_rows).repeat_interleave(num_new)
        self.batch = AttentionBatch(
            query_start_loc=torch.arange(num_rows + 1, dtype=torch.int32) * num_new,
            seq_lens=torch.full((num_rows,), context, dtype=torch.int32),
            positions=positions,
            block_table=table.int(),
            slot_mapping=table[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
            max_query_len=num_new,
            max_seq_len=context,
            query_lens=(num_new,) * num_rows,
            host_seq_lens=(context,) * num_rows,
        )
        shape = (num_rows * num_new, SPEC.num_heads + 2 * SPEC.num_kv_heads, SPEC.head_dim)
        heads = torch.randn(shape, generator=generator).to(dtype)
        self.new = heads.split([SPEC.num_heads, SPEC.num_kv_heads, SPEC.num_kv_heads], dim=1)

    def plan(self) -> None:
        self.backend.plan(self.batch)

    @torch.inference_mode()
    def forward(self) -> torch.Tensor:
        return self.backend.forward(0, *self.new)


def measure(benchmark: BenchmarkFixture, step: Step, rounds: int) -> None:
    step.plan()
    out = benchmark.pedantic(step.forward, rounds=rounds, warmup_rounds=3)
    assert out.shape == step.new[0].shape and bool(out.isfinite().all())


@pytest.mark.parametrize("context", [128, 1024])
@pytest.mark.parametrize("num_rows", [1, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(benchmark: BenchmarkFixture, dtype: torch.dtype, num_rows: int, context: int) -> None:
    measure(benchmark, Step(dtype, num_rows, context, 1), rounds=50)


@pytest.mark.parametrize(("num_rows", "length"), [(1, 128), (8, 128), (1, 1024)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill(benchmark: BenchmarkFixture, dtype: torch.dtype, num_rows: int, length: int) -> None:
    measure(benchmark, Step(dtype, num_rows, length, length), rounds=20)


@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_planning_a_decode_step(benchmark: BenchmarkFixture, num_rows: int) -> None:
    """Once a step, for all layers."""
    step = Step(torch.float32, num_rows, 1024, 1)
    benchmark.pedantic(step.plan, rounds=50, warmup_rounds=3)
    assert bool(step.forward().isfinite().all())
