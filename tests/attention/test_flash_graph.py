"""Steps of the Triton backend captured once in a CUDA graph and replayed for lengths that they were not captured at."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements, LayerSpec
from llmkit_attention.flash.limits import find_spec
from tests.attention.sequences import captured, dense

SPEC = LayerSpec(8, 2, 128, 128**-0.5)
BLOCK, ROWS, BOUND = 16, 4, 1024


def decode_batch(lengths: list[int], table: torch.Tensor) -> AttentionBatch:
    """Rows of `lengths` keys, 0 for one that only fills up; `table` int32 [ROWS, blocks] on the device."""
    last = torch.tensor(lengths, device="cuda") - 1
    slots = table.gather(1, (last.clamp(0) // BLOCK)[:, None])[:, 0].long() * BLOCK + last.clamp(0) % BLOCK
    starts = torch.arange(ROWS + 1, dtype=torch.int32, device="cuda")
    slots = torch.where(last < 0, -1, slots)
    ones, bounds = (1,) * ROWS, (BOUND,) * ROWS
    return AttentionBatch(starts, (last + 1).int(), last.clamp(0), table, slots, 1, BOUND, ones, bounds)


REPLAYS = [
    ([1000, 1, 0, 17], 0),
    ([1000, 280, 0, 600], 17),
    ([64, 65, 1024, 513], 0),
    ([0, 0, 0, 300], 17),
    ([513, 600, 1024, 577], 32),
]
"""Lengths, and how many blocks all rows have in common with the first."""


@pytest.mark.cuda
@pytest.mark.parametrize("num_repeated", [0, 1 << 40])
def test_a_captured_step_serves_other_lengths_and_tables(num_repeated: int) -> None:
    """Rows begin with so many blocks of the first one, whether or not the step was captured for such rows."""
    assert find_spec("triton") is not None, "a GPU without triton"
    from llmkit_attention.flash.backend import FlashAttention

    requirements = AttentionRequirements("cuda", "bfloat16", BLOCK, (SPEC,))
    device = torch.device("cuda")
    backend = FlashAttention(FlashAttention.Settings(), requirements, torch.bfloat16, device)
    pages = BOUND // BLOCK
    backend.allocate(ROWS * pages)
    torch.manual_seed(0)
    backend._pools[0].normal_()
    table = torch.randperm(ROWS * pages, device=device, dtype=torch.int32).view(ROWS, pages)
    query, key, value = (torch.randn(ROWS, heads, 128, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2))
    static = replace(decode_batch([1, 2, 3, 0], table.clone()), num_repeated_keys=num_repeated)
    assert backend.capturable(static)
    graph, out = captured(backend, static, query, key, value)
    for lengths, num_common in REPLAYS:
        now = table.clone()
        now[:, :num_common] = table[0, :num_common]
        fresh = decode_batch(lengths, now)
        static.block_table.copy_(now)
        static.seq_lens.copy_(fresh.seq_lens)
        static.slot_mapping.copy_(fresh.slot_mapping)
        graph.replay()
        for row, length in enumerate(lengths):
            if not length:
                continue
            pool = backend._pools[0][:, now[row].long()].transpose(2, 3).reshape(2, -1, 2, 128)[:, :length].cpu()
            assert torch.equal(pool[0, -1], key[row].cpu()) and torch.equal(pool[1, -1], value[row].cpu())
            wanted = dense(SPEC, query[row : row + 1].cpu(), pool[0], pool[1])
            assert (out[row].cpu() - wanted).abs().max() <= 4e-2


MIXES = [
    [(300, 0), (0, 0), (1, 500), (64, 77)],
    [(1, 9), (128, 384), (2, 0), (381, 63)],
    [(0, 0), (512, 100), (0, 0), (0, 0)],
]
"""New tokens and stored keys of every row."""


@pytest.mark.cuda
@pytest.mark.parametrize("block", [16, 64])
def test_a_captured_step_with_prompts_serves_other_rows(block: int) -> None:
    """It is captured for rows without tokens; blocks of 64 have a kernel of their own on Hopper."""
    from llmkit_attention.flash.backend import FlashAttention

    device, pages, num_tokens = torch.device("cuda"), BOUND // block, 512
    requirements = AttentionRequirements("cuda", "bfloat16", block, (SPEC,))
    backend = FlashAttention(FlashAttention.Settings(), requirements, torch.bfloat16, device)
    backend.allocate(ROWS * pages)
    torch.manual_seed(0)
    table = torch.randperm(ROWS * pages, device=device, dtype=torch.int32).view(ROWS, pages)
    query, key, value = torch.randn(num_tokens, 12, 128, device=device, dtype=torch.bfloat16).split([8, 2, 2], dim=1)
    starts = torch.zeros(ROWS + 1, dtype=torch.int32, device=device)
    lengths, slots = torch.zeros_like(starts[1:]), torch.full((num_tokens,), -1, device=device)
    counts, bounds = (num_tokens,) * ROWS, (BOUND,) * ROWS
    static = AttentionBatch(
        starts, lengths, torch.zeros_like(slots), table, slots, num_tokens, BOUND, counts, bounds, lens_are_bounds=True
    )
    graph, out = captured(backend, static, query, key, value)
    for rows in MIXES:
        backend._pools[0].normal_()
        begins = [0, *accumulate(count for count, _ in rows)]
        starts.copy_(torch.tensor(begins))
        lengths.copy_(torch.tensor([count and count + stored for count, stored in rows]))
        slots.fill_(-1)
        for row, ((count, stored), begin) in enumerate(zip(rows, begins[:-1], strict=True)):
            places = torch.arange(stored, stored + count, device=device)
            slots[begin : begin + count] = table[row, places // block].long() * block + places % block
        graph.replay()
        for row, ((count, stored), begin) in enumerate(zip(rows, begins[:-1], strict=True)):
            pool = backend._pools[0][:, table[row].long()].transpose(2, 3).reshape(2, -1, 2, 128)
            wanted = dense(SPEC, query[begin : begin + count].cpu(), *pool[:, : stored + count].cpu())
            assert (out[begin : begin + count].cpu() - wanted).abs().lt(4e-2).all(), (rows, row)
