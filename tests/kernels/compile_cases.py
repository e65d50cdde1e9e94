"""Every Triton kernel of the project compiled for sm_90 in the shapes of real models: registers, spills, shared memory.

Not collected by itself: `test_compiled.py` runs it in a process of its own. A new kernel needs a line in `LAUNCHES`,
and `test_every_kernel_is_compiled` says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks.profile_gpu import REST, kind_of
from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements, KeyValueSlots, LayerSpec
from llmkit.model import expert_kernels, layer_kernels, row_kernels, tile_kernels
from llmkit.model.rehearsal import rehearse
from llmkit.model.sampling.device_sampler import DeviceSampler
from llmkit.model.structure import ACTIVATIONS
from llmkit_attention.flash.backend import FlashAttention
from tests.kernels.compiler import MAX_SHARED, LaunchesNoted, Resources, compiling, kernels_of_the_project, resources

CPU = torch.device("cpu")
MAX_REGISTERS = 255
REGISTERS_OF_A_MULTIPROCESSOR = 65536
TOLERATED = {"attend_one": 8, "attend_many_hopper": 8}
"""Bytes: the compiler that comes with Triton 3.7 spills one number of `attend_one` for groups of four, and one of
`attend_many_hopper` outside its inner loops; 3.6 none."""
BLOCK, NUM_BLOCKS = 64, 32


@dataclass(frozen=True, slots=True)
class Shape:
    """A model as far as kernels see it; `normed` queries and keys are normalised per head."""

    layers: tuple[LayerSpec, ...]
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    normed: bool = False


def layer(num_heads: int, num_kv_heads: int, head_dim: int, **options: float) -> LayerSpec:
    return LayerSpec(num_heads, num_kv_heads, head_dim, head_dim**-0.5, **options)  # type: ignore[arg-type]


SHAPES = {
    "qwen3_0_6b": Shape((layer(16, 8, 128),), 1024, 3072, 151936, normed=True),
    "llama_8b": Shape((layer(32, 8, 128),), 4096, 14336, 128256),
    "gemma2_2b": Shape(
        (layer(8, 4, 256, softcap=50.0, window=4096), layer(8, 4, 256, softcap=50.0)), 2304, 9216, 256000
    ),
}


def batch(*query_lens: int, length: int, repeated: int = 0) -> AttentionBatch:
    """Rows of `length` keys with so many new tokens each, of which rows repeat some; contents do not matter."""
    num_rows, num_tokens = len(query_lens), sum(query_lens)

    def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    return AttentionBatch(
        query_start_loc=numbers(num_rows + 1),
        seq_lens=numbers(num_rows),
        positions=numbers(num_tokens, dtype=torch.int64),
        block_table=numbers(num_rows, 128),
        slot_mapping=numbers(num_tokens, dtype=torch.int64),
        max_query_len=max(query_lens),
        max_seq_len=length,
        query_lens=query_lens,
        host_seq_lens=(length,) * num_rows,
        num_repeated_keys=repeated,
    )


def attention(shape: Shape, block_size: int = BLOCK, **settings: str) -> None:
    """Decodes of one row and of many, short and long; prompts, alone and beside decodes."""
    requirements = AttentionRequirements("cuda", "bfloat16", block_size, shape.layers)
    backend = FlashAttention(FlashAttention.Settings(**settings), requirements, torch.bfloat16, CPU)
    backend.allocate(NUM_BLOCKS)
    steps = [batch(*[1] * rows, length=length) for rows in (1, 64, 256) for length in (512, 8192)]
    steps += [batch(*[1] * rows, length=4096, repeated=rows * 2048) for rows in (64, 1000)]
    steps += [batch(512, 512, length=512), batch(300, 1, length=8192), batch(*[3] * 1000, length=512)]
    for step in steps:
        backend.plan(step)
        for index, spec in enumerate(shape.layers):
            heads = spec.num_heads + 2 * spec.num_kv_heads
            merged = torch.empty(len(step.positions), heads, spec.head_dim, dtype=torch.bfloat16)
            backend.forward(index, *merged.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1))


def attention_over_small_blocks(shape: Shape) -> None:
    """The same where a tile lies in several blocks, so that no bulk copy takes it."""
    attention(shape, block_size=16)


def attention_in_fp8(shape: Shape) -> None:
    """The same over keys and values in e4m3, and the rotation that stores them."""
    attention(shape, kv_dtype="fp8")
    between_products(shape, torch.float8_e4m3fn)


def between_products(shape: Shape, stored: torch.dtype = torch.bfloat16) -> None:
    """What stands between the products of a fused layer."""
    spec = shape.layers[0]

    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.bfloat16)

    hidden, weight = tensor(4, shape.hidden_size), (tensor(shape.hidden_size), 1e-6)
    layer_kernels.add_rms_norm(hidden, None, weight)
    layer_kernels.add_rms_norm(hidden, hidden, weight)
    layer_kernels.add_rms_norm(hidden, hidden, weight, (weight[0].float(), 1e-6))
    qkv = tensor(4, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
    norm = (tensor(spec.head_dim), 1e-6) if shape.normed else None
    table = tensor(4, 1, spec.head_dim)
    layer_kernels.norm_and_rotate(qkv, spec.num_heads, spec.num_kv_heads, norm, norm, table, table)
    pools = tensor(2, NUM_BLOCKS, spec.num_kv_heads, BLOCK, spec.head_dim).to(stored)
    slots = KeyValueSlots(pools[0], pools[1], torch.zeros(4, dtype=torch.int64))
    layer_kernels.norm_and_rotate(qkv, spec.num_heads, spec.num_kv_heads, norm, norm, table, table, slots)
    for activation in ACTIVATIONS:
        layer_kernels.activate_and_multiply(tensor(4, 2 * shape.intermediate_size), activation)


def products_of_rows(shape: Shape) -> None:
    """The products of a fused layer for few tokens."""
    spec, hidden, inner = shape.layers[0], shape.hidden_size, shape.intermediate_size
    heads, context = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, spec.num_heads * spec.head_dim

    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.bfloat16)

    for rows in (1, row_kernels.MAX_ROWS):
        norm, residual = (tensor(hidden), 1e-6), tensor(rows, hidden)
        row_kernels.multiply_rows(residual, (tensor(heads, hidden), None), norm=norm)
        row_kernels.multiply_rows(tensor(rows, context), (tensor(hidden, context), None), residual=residual)
        row_kernels.multiply_rows(residual, (tensor(2 * inner, hidden), None), norm=norm, gated=True)
        row_kernels.multiply_rows(tensor(rows, inner), (tensor(hidden, inner), None), residual=residual)


def experts(shape: Shape) -> None:
    """As if the model had experts as wide as its layers, for few tokens each, for some and for many."""
    num_experts, hidden, inner = 8, shape.hidden_size, shape.intermediate_size
    for dtype in (torch.bfloat16, torch.float32):
        gate_up = torch.empty(num_experts, 2 * inner, hidden, dtype=dtype)
        down = torch.empty(num_experts, hidden, inner, dtype=dtype)
        for rows in (1, 128, 2048):
            routing = expert_kernels.route(torch.empty(rows, num_experts, dtype=dtype), 2, normalises=True)
            for activation in ACTIVATIONS:
                expert_kernels.multiply_experts(
                    torch.empty(rows, hidden, dtype=dtype), routing, gate_up, down, activation
                )
    expert_kernels.routing_of(torch.empty(4, 6), torch.zeros(4, 6, dtype=torch.int64), 64)
    expert_kernels.route(torch.empty(4, 128, dtype=torch.bfloat16), 8, normalises=False)


def products_of_tiles(shape: Shape) -> None:
    """The products of a fused layer for some dozens of tokens, where weights are small."""
    spec, hidden, inner = shape.layers[0], shape.hidden_size, shape.intermediate_size
    heads, context = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, spec.num_heads * spec.head_dim

    def tensor(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.bfloat16)

    for rows in (8, 24, tile_kernels.MAX_ROWS):
        norm, residual = (tensor(hidden), 1e-6), tensor(rows, hidden)
        tile_kernels.multiply(residual, (tensor(heads, hidden), None))
        added, normed = tile_kernels.multiply_and_norm(
            tensor(rows, context), (tensor(hidden, context), None), residual, norm
        )
        tile_kernels.multiply(normed, (tensor(heads, hidden), tensor(heads)))
        tile_kernels.multiply(normed, (tensor(2 * inner, hidden), None), gated=True)
        tile_kernels.multiply(tensor(rows, inner), (tensor(hidden, inner), None), added)


def sampler(shape: Shape) -> None:
    """The choice of tokens, with and without a table of tokens to store them in, and by filters."""
    logits, numbers = torch.empty(4, shape.vocab_size, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    made = DeviceSampler(shape.vocab_size, 4, CPU)
    made.choose(logits, numbers, numbers)
    made.choose(logits, numbers, numbers, torch.zeros(4, 100, dtype=torch.int64))
    made.choose_filtered(logits, numbers, numbers)
    made.choose_filtered(logits.float(), numbers, numbers)


LAUNCHES: dict[str, Callable[[Shape], None]] = {
    "attention": attention,
    "attention in fp8": attention_in_fp8,
    "attention over small blocks": attention_over_small_blocks,
    "between products": between_products,
    "products of rows": products_of_rows,
    "products of tiles": products_of_tiles,
    "experts": experts,
    "sampler": sampler,
}


def check(used: Resources) -> None:
    assert used.num_registers <= MAX_REGISTERS, used
    assert used.num_registers * used.num_warps * 32 <= REGISTERS_OF_A_MULTIPROCESSOR, used
    assert used.num_spilled <= TOLERATED.get(used.kernel, 0), used
    assert used.num_shared <= MAX_SHARED, used


@pytest.fixture(autouse=True, scope="module")
def compiled() -> set[str]:
    """Names of the kernels that were compiled so far."""
    return set()


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fits_an_h200(shape: str, launch: str, tmp_path: Path, compiled: set[str]) -> None:
    with compiling() as kernels:
        LAUNCHES[launch](SHAPES[shape])
    assert kernels
    for name, kernel in {id(kernel): (name, kernel) for name, kernel in kernels}.values():
        used = resources(name, kernel, tmp_path)
        print(f"{shape}: {used}")
        check(used)
        compiled.add(name)


def test_every_kernel_is_compiled(compiled: set[str]) -> None:
    assert kernels_of_the_project() <= compiled


def test_every_kernel_that_decodes_serves_any_number_of_rows() -> None:
    """Else a batch of another size waits for the compiler, while requests are being served."""
    requirements = AttentionRequirements("cuda", "bfloat16", BLOCK, SHAPES["qwen3_0_6b"].layers)
    with compiling() as kernels:
        backend = FlashAttention(FlashAttention.Settings(), requirements, torch.bfloat16, CPU)
        backend.allocate(NUM_BLOCKS)
        for rows in (17, 24, 32, 100, 256):
            backend.plan(batch(*[1] * rows, length=512))
            backend.attend(0, torch.empty(rows, 16, 128, dtype=torch.bfloat16))
    assert len({id(kernel) for name, kernel in kernels if name == "attend_one_hopper"}) == 1


def test_every_kernel_has_a_kind_in_profiles() -> None:
    assert [name for name in kernels_of_the_project() if kind_of(name) == REST] == []


def test_the_kernels_of_a_step_compile_side_by_side_and_none_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In other processes: nothing but files tells of it."""
    shape, hits, launch = SHAPES["qwen3_0_6b"], [], JITFunction.run
    cache, launchers = tmp_path / "cache", tmp_path / "launchers"
    launchers.mkdir()
    driver = LaunchesNoted(launchers)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(cache))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda cache_hit, **_: hits.append(cache_hit))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    x = torch.ones(24, shape.hidden_size, dtype=torch.bfloat16)
    written: list[torch.Tensor] = []

    def step() -> None:
        total, normed = layer_kernels.add_rms_norm(x, x, (x[0], 1e-6))
        written.extend([total, normed, layer_kernels.activate_and_multiply(torch.cat([normed, total], dim=1), "silu")])

    rehearse(CPU, step)
    assert not written
    for kernel in (layer_kernels._add_rms_norm, layer_kernels._activate_and_multiply):
        kernel.device_caches.clear()  # of what other tests have compiled in this process
    with compiling():
        triton.runtime.driver.set_active(driver)
        run = JITFunction.run
        rehearse(torch.device("cuda"), step, step)
        assert JITFunction.run is run and len(written) == 6 and not any(tensor.any() for tensor in written)
        names, processes = zip(*(path.name.split() for path in launchers.iterdir()), strict=True)
        assert sorted(names) == ["_activate_and_multiply", "_add_rms_norm"], "a launcher is missing, or was made twice"
        assert str(os.getpid()) not in processes and not hits
        rehearse(torch.device("cuda"), step)
        assert len(list(launchers.iterdir())) == 2, "what is in the cache was compiled again"
        monkeypatch.setattr(JITFunction, "run", launch)
        step()
    assert driver.launched == ["_add_rms_norm", "_activate_and_multiply"]
    assert hits == [True, True], "the step compiles again"


def test_a_step_that_fails_in_rehearsal_is_left_to_fail_for_real(caplog: pytest.LogCaptureFixture) -> None:
    run = JITFunction.run
    rehearse(torch.device("cuda"), lambda: torch.ones(2) @ torch.ones(3))
    assert "kernels compile one by one: inconsistent tensor size" in caplog.text and JITFunction.run is run
