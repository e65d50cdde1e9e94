"""The SDPA backend alone, against dense attention in float64: every option, layout and kind of step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmkit.interfaces.attention import AttentionRequirements, LayerSpec
from llmkit.types import BlockCopy
from llmkit_attention.sdpa import SdpaAttention
from tests.attention.sequences import CPU, Rows, Sequences

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Absolute; values are N(0, 1)."""
HEADS = {1: (2, 2), 2: (4, 2), 4: (4, 1), 8: (16, 2)}
"""(query heads, KV heads) by how many of the first share one of the second."""
STEPS: list[Rows] = [
    [("a", 5)],
    [("a", 1), ("b", 17), ("c", 3)],
    [("c", 9), ("b", 1), ("a", 1)],
    [("b", 1), ("c", 1), ("a", 1)],
    [("d", 2), ("a", 1), ("e", 1), ("f", 2)],
    [("e", 33), ("b", 1), ("d", 8), ("c", 6)],
]
"""Prompts alone, beside decodes and of like lengths; chunks behind a cached prefix; decodes only; rows that move."""
FORKED: list[Rows] = [
    [("x", 1), ("b", 1), ("y", 1)],
    [("y", 6), ("b", 1), ("x", 1), ("a", 1)],
    [("x", 1), ("b", 1), ("y", 1), ("a", 1)],
]
"""Forks of `b` beside it."""


def layer(ratio: int = 2, head_dim: int = 16, **options: Any) -> LayerSpec:
    num_heads, num_kv_heads = HEADS[ratio]
    return LayerSpec(num_heads, num_kv_heads, head_dim, **{"scale": head_dim**-0.5, **options})


MANY = [
    layer(ratio, head_dim, window=window, softcap=softcap)
    for ratio, head_dim, window, softcap in [
        (1, 16, None, None),
        (2, 32, 1, 2.0),
        (4, 64, 7, None),
        (8, 16, None, 1.5),
        (2, 80, 7, 30.0),
        (2, 32, None, None),
    ]
]


def run(sequences: Sequences, steps: list[Rows]) -> None:
    tolerance = TOLERANCE[sequences.dtype]
    for number, rows in enumerate(steps):
        error = sequences.step(rows)
        assert error <= tolerance, f"step {number}, {rows}: {error:.1e}"


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("ratio", HEADS)
def test_shared_kv_heads_and_windows(ratio: int, window: int | None) -> None:
    run(Sequences(SdpaAttention, [layer(ratio, window=window)]), STEPS)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
def test_head_dimensions(head_dim: int) -> None:
    run(Sequences(SdpaAttention, [layer(4, head_dim)]), STEPS)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("scale", [0.05, 1.0])
@pytest.mark.parametrize("softcap", [None, 0.7, 50.0])
def test_scale_and_softcap(softcap: float | None, scale: float, window: int | None) -> None:
    run(Sequences(SdpaAttention, [layer(2, window=window, scale=scale, softcap=softcap)]), STEPS)


@pytest.mark.parametrize("block_size", [1, 2, 5, 16, 64])
def test_layers_that_differ_in_blocks_of_any_size(block_size: int) -> None:
    run(Sequences(SdpaAttention, MANY, block_size=block_size, num_blocks=max(8, 160 // block_size)), STEPS)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype: torch.dtype) -> None:
    run(Sequences(SdpaAttention, MANY, dtype), STEPS)


def test_tolerances_tell_float32_from_float64_and_bfloat16() -> None:
    """A backend that computed in the wrong type would be seen."""
    for dtype, coarser in [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)]:
        assert Sequences(SdpaAttention, MANY, coarser).step(STEPS[0]) > TOLERANCE[dtype]


def random_steps(rng: random.Random, sequences: Sequences, num_steps: int) -> Iterator[Rows]:
    """Decodes, prompts and chunks in any order; now and then a sequence ends and another takes its blocks."""
    for number in range(num_steps):
        names = rng.sample("abcdef", rng.randint(1, 6))
        for name in names:
            if name in sequences.stored and (rng.random() < 0.15 or sequences.stored[name].length > 30):
                sequences.free(name)
        lens = [1 if number % 3 == 0 else rng.choice([1, 1, 2, 3, 4, 7, 12]) for _ in names]
        yield list(zip(names, lens, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_random_steps(seed: int) -> None:
    """Host lengths are upper bounds only, here by up to three tokens."""
    rng = random.Random(seed)
    specs = [
        layer(rng.choice(list(HEADS)), rng.choice([16, 48]), window=rng.choice([None, 3, 11]), softcap=softcap)
        for softcap in (None, None, 3.0)
    ]
    sequences = Sequences(SdpaAttention, specs, block_size=rng.choice([1, 3, 8]), num_blocks=260, seed=seed)
    for rows in random_steps(rng, sequences, 12):
        error = sequences.step(rows, slack=rng.randint(0, 3))
        assert error <= 1e-12, f"{rows}: {error:.1e}"


class CountOperators(TorchDispatchMode):
    """Counts every operator torch dispatches."""

    num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the queries `scaled_dot_product_attention` is called with."""
    shapes: list[tuple[int, ...]] = []
    original = F.scaled_dot_product_attention

    def counting(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", counting)
        yield shapes


def decodes(num_rows: int, layers: list[LayerSpec]) -> Sequences:
    """Sequences of different lengths, each with a prompt already stored."""
    sequences = Sequences(SdpaAttention, layers, num_blocks=num_rows * 3 + 12, seed=num_rows)
    sequences.step([(str(n), 1 + n % 9) for n in range(num_rows)])
    return sequences


@pytest.mark.parametrize("num_rows", [1, 2, 40])
def test_a_decode_step_is_one_call_a_layer(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer(2), layer(4, window=3), layer(8)]
    sequences = decodes(num_rows, layers)
    with counted(monkeypatch) as shapes:
        assert sequences.step([(str(n), 1) for n in range(num_rows)]) <= 1e-12
    assert shapes == [(num_rows, spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, 16) for spec in layers]


def test_a_mixed_step_is_one_call_for_all_its_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = decodes(9, [layer(2)])
    with counted(monkeypatch) as shapes:
        sequences.step([*((str(n), 1) for n in range(9)), ("long", 18), ("longer", 20), ("short", 2)])
    assert sorted(shape[0] for shape in shapes) == [1, 2, 9], shapes


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_operator_of_a_decode_step_runs_once_a_row(softcap: float | None) -> None:
    """Planning included: as many operators for 40 rows as for 2."""
    counts = []
    for num_rows in (2, 40):
        sequences = decodes(num_rows, [layer(2, softcap=softcap)])
        rows = [(str(n), 1) for n in range(num_rows)]
        for name, _ in rows:
            sequences._grow(name, 1)
        batch, (query, key, value) = sequences.batch(rows), sequences.draw(0, num_rows)
        with CountOperators() as counter:
            sequences.backend.plan(batch)
            sequences.backend.forward(0, query, key, value)
        counts.append(counter.num_calls)
    assert counts[0] == counts[1] > 0


def test_sequences_go_on_after_waiting_on_the_host() -> None:
    sequences = Sequences(SdpaAttention, MANY)
    run(sequences, STEPS[:3])
    sequences.swap("a", "b")
    run(sequences, STEPS[3:])


@pytest.mark.parametrize("block_size", [4, 5, 16])
def test_forks_share_full_blocks_and_go_on_from_a_copy(block_size: int) -> None:
    sequences = Sequences(SdpaAttention, MANY, block_size=block_size)
    run(sequences, STEPS[:3])
    sequences.fork("b", 11, "x", "y")
    run(sequences, FORKED)
    sequences.fork("y", 13, "z")
    sequences.free("b")
    run(sequences, [[("z", 3), ("x", 1)], [("z", 1), ("y", 1)]])


def test_nothing_is_copied_but_what_is_shared() -> None:
    """What the parent has written behind it may be NaN, which no mask hides."""
    sequences = Sequences(SdpaAttention, MANY, block_size=8)
    run(sequences, [[("b", 12)]])
    for pool in sequences.backend._pools:  # type: ignore[attr-defined]
        pool.view(2, sequences.num_blocks, 8, -1)[:, sequences.stored["b"].blocks[1], 3:] = float("nan")
    sequences.fork("b", 11, "x", "y")
    run(sequences, [[("x", 1), ("y", 2)], [("x", 1), ("y", 1)]])


def test_all_blocks_are_read_before_any_is_written() -> None:
    sequences = Sequences(SdpaAttention, [layer()], num_blocks=3)
    (pool,) = sequences.backend._pools  # type: ignore[attr-defined]
    one, two, three = pool.clone().unbind(1)
    sequences.backend.copy_blocks([BlockCopy(0, 1, 4), BlockCopy(1, 2, 4), BlockCopy(2, 0, 4)])
    assert pool.equal(torch.stack([three, one, two], dim=1)) and not one.equal(two)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bytes_per_block_is_what_allocate_takes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = AttentionRequirements("cpu", str(dtype).removeprefix("torch."), 5, tuple(MANY))
    backend = SdpaAttention(SdpaAttention.Settings(), requirements, dtype, CPU)
    taken = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            taken.append(out.untyped_storage().nbytes())
            assert not out.any()
            return out

    with Allocations():
        backend.allocate(7)
    by_hand = sum(2 * 5 * spec.num_kv_heads * spec.head_dim * dtype.itemsize for spec in MANY)
    assert sum(taken) == 7 * backend.bytes_per_block() == 7 * by_hand


def check(dtype: str, *layers: LayerSpec) -> list[str]:
    return SdpaAttention.check(AttentionRequirements("cpu", dtype, 16, layers))


def test_check_accepts_what_it_serves() -> None:
    for dtype in TOLERANCE:
        assert check(str(dtype).removeprefix("torch."), *MANY) == []


def test_check_names_every_reason_once() -> None:
    odd = LayerSpec(6, 4, 16, 0.25)
    assert check("float32", odd, layer(), odd) == ["6 query heads do not divide into 4 KV heads"]
    reasons = check("float8_e4m3fn", odd)
    assert len(reasons) == 2
    assert reasons[0].startswith("dtype float8_e4m3fn is not one of") and "bfloat16" in reasons[0]
