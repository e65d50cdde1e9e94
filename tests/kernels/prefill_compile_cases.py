"""Which kernel serves prompts on Hopper, compiled for sm_90: registers, spills, shared memory, and one fault of Triton.

Not collected by itself: `test_compiled.py` runs it in a process of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llmkit.interfaces.attention import AttentionRequirements, LayerSpec
from llmkit_attention.flash.backend import FlashAttention
from tests.kernels.compile_cases import CPU, NUM_BLOCKS, batch, check, layer
from tests.kernels.compiler import compiling, resources


@pytest.mark.parametrize(
    ("spec", "dtype", "block_size", "kernel"),
    [
        (layer(16, 8, 128), torch.float16, 128, "attend_many_hopper"),
        (layer(64, 8, 64, window=128), torch.bfloat16, 64, "attend_many_hopper"),
        (layer(6, 1, 128, window=100, softcap=50.0), torch.bfloat16, 64, "attend_many_hopper"),
        (layer(8, 8, 128), torch.bfloat16, 64, "attend_many"),
        (layer(16, 8, 96), torch.bfloat16, 64, "attend_many"),
        (layer(16, 8, 128), torch.bfloat16, 32, "attend_many"),
    ],
)
def test_prompts_on_hopper(spec: LayerSpec, dtype: torch.dtype, block_size: int, kernel: str, tmp_path: Path) -> None:
    requirements = AttentionRequirements("cuda", str(dtype).removeprefix("torch."), block_size, (spec,))
    backend = FlashAttention(FlashAttention.Settings(), requirements, dtype, CPU)
    with compiling() as kernels:
        backend.allocate(NUM_BLOCKS)
        backend.plan(batch(300, 200, length=8192))
        heads = torch.empty(500, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim, dtype=dtype)
        backend.forward(0, *heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1))
    (made,) = (made for name, made in kernels if name == kernel)
    check(resources(kernel, made, tmp_path))
    if kernel == "attend_many_hopper":
        check_that_turns_are_told_apart(made.asm["ttgir"])


def check_that_turns_are_told_apart(code: str) -> None:
    """In the loops over a program's items, the bounds of loops over tiles are computed in the turn they are for."""
    lines = code.splitlines()
    loops = [(number, len(line) - len(line.lstrip())) for number, line in enumerate(lines) if " = scf.for " in line]
    outer = min(depth for _, depth in loops)
    turn, bounds = 0, []
    for number, depth in loops:
        if depth == outer:
            turn = number
        else:
            bound = re.findall(r" to (%\w+)", lines[number])[0]
            bounds.append(any(line.lstrip().startswith(bound + " =") for line in lines[turn:number]))
    assert len(bounds) == 3 and all(bounds)
