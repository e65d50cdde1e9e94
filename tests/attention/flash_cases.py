"""What the Triton backend must do, run once in Triton's interpreter (float16) and once on a GPU (bfloat16).

Not collected by itself: `test_flash.py` runs it in a process of its own, as the interpreter is chosen by environment.
"""

from __future__ import annotations

import os
import random
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements, LayerSpec
from llmkit.interfaces.settings import Settings
from llmkit_attention.flash.backend import FlashAttention
from llmkit_attention.flash.prefill_list import list_longest_first
from tests.attention.sequences import Rows, Sequences, dense

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPE, TOLERANCE = (torch.float16, 6e-3) if INTERPRETED else (torch.bfloat16, 4e-2)
BLOCK_SIZES = (16,) if INTERPRETED else (16, 64)
"""Blocks that hold a tile have kernels of their own on Hopper."""
HEADS = {1: (2, 2), 2: (4, 2), 4: (4, 1), 8: (16, 2), 6: (6, 1)}
STEPS: list[Rows] = [
    [("a", 5), ("b", 70)],
    [("a", 1), ("b", 1), ("c", 3)],
    [("c", 9), ("b", 66), ("a", 1)],
    [("b", 1), ("c", 1), ("a", 1)],
]
"""Prompts longer than a tile, beside decodes; chunks behind a cached prefix; decodes only."""
UNLIKE = (129, 1, 64, 2, 65)
if not INTERPRETED:
    UNLIKE += (300, 128, 640, 127, 63, 513, 700, 257, 1, 400, 200)
"""New tokens of rows; on a GPU of more tiles, for pairs of heads, than an H200 has multiprocessors."""
FORKED: list[Rows] = [
    [("x", 1), ("b", 1), ("y", 1)],
    [("y", 6), ("b", 1), ("x", 1), ("a", 1)],
    [("x", 1), ("y", 1), ("b", 1)],
]
"""Forks of `b` beside it."""


class OnDevice(FlashAttention):
    """The backend on DEVICE behind an interface on the CPU."""

    @classmethod
    def check(cls, requirements: AttentionRequirements) -> list[str]:
        return super().check(replace(requirements, device="cuda"))

    def __init__(self, settings: Settings, requirements: AttentionRequirements, dtype: torch.dtype, _: Any) -> None:
        super().__init__(settings, replace(requirements, device="cuda"), dtype, DEVICE)

    def plan(self, batch: AttentionBatch) -> None:
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        super().plan(replace(batch, **{k: v.to(DEVICE) for k, v in values.items() if isinstance(v, torch.Tensor)}))

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return super().forward(layer, query.to(DEVICE), key.to(DEVICE), value.to(DEVICE)).cpu()

    def spoil(self, blocks: list[int]) -> None:
        """Whoever holds `blocks` now has written NaN."""
        for pool in self._pools:
            pool[:, blocks] = float("nan")


class Turned(OnDevice):
    """Queries lie head by head."""

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return super().forward(layer, query.transpose(0, 1).contiguous().transpose(0, 1), key, value)


class Spoilt(Sequences):
    """Slots that are free hold NaN, which the interpreter would take long to write through the backend."""

    def _spill(self) -> None:
        self.backend.spoil(self._free)  # type: ignore[attr-defined]


def layer(ratio: int = 2, head_dim: int = 64, **options: Any) -> LayerSpec:
    num_heads, num_kv_heads = HEADS[ratio]
    return LayerSpec(num_heads, num_kv_heads, head_dim, **{"scale": head_dim**-0.5, **options})


def sequences(
    layers: list[LayerSpec],
    block_size: int = 16,
    num_blocks: int = 40,
    dtype: torch.dtype = DTYPE,
    backend: type[OnDevice] = OnDevice,
) -> Sequences:
    return Spoilt(backend, layers, dtype, block_size=block_size, num_blocks=num_blocks)


def run(made: Sequences, steps: list[Rows] = STEPS) -> None:
    for number, rows in enumerate(steps):
        error = made.step(rows, slack=number)
        assert error <= TOLERANCE, f"step {number}, {rows}: {error:.1e}"


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("ratio", HEADS)
def test_shared_kv_heads_and_windows(ratio: int, window: int | None, block_size: int) -> None:
    run(sequences([layer(ratio, window=window)], block_size))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_dimensions(head_dim: int, block_size: int) -> None:
    run(sequences([layer(4, head_dim)], block_size))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("softcap", "scale"), [(0.7, 1.0), (50.0, 0.1), (2.0, 0.05)])
def test_scale_and_softcap(softcap: float, scale: float, block_size: int) -> None:
    run(sequences([layer(2, scale=scale, softcap=softcap, window=window) for window in (None, 7)], block_size))


@pytest.mark.parametrize("block_size", [1, 16, 64, 128])
def test_blocks_of_any_power_of_two_in_layers_that_differ(block_size: int) -> None:
    run(sequences([layer(2), layer(4, 32, window=9)], block_size, max(8, 512 // block_size)))


@pytest.mark.parametrize("window", [None, 300])
def test_long_rows_are_split_and_short_ones_beside_them(window: int | None) -> None:
    made = sequences([layer(4, window=window)], block_size=64)
    run(made, [[("long", 1100), ("short", 3)], [("long", 1), ("short", 1)], [("short", 1), ("new", 1), ("long", 1)]])


@pytest.mark.parametrize(
    ("options", "block_size", "dtype"),
    [
        ({"ratio": 8, "head_dim": 128}, 64, DTYPE),
        ({"ratio": 8, "head_dim": 64}, 128, torch.float16),
        ({"ratio": 8, "head_dim": 128, "window": 100}, 128, DTYPE),
        ({"ratio": 6, "head_dim": 64, "window": 64}, 64, DTYPE),
        ({"ratio": 8, "head_dim": 64, "window": 200, "softcap": 2.0}, 64, DTYPE),
        ({"ratio": 8, "head_dim": 128, "softcap": 20.0}, 64, torch.float16),
        ({"ratio": 1, "head_dim": 128}, 64, DTYPE),
    ],
)
def test_many_prompts_of_unlike_lengths(options: dict[str, Any], block_size: int, dtype: torch.dtype) -> None:
    """Chunks of them too, behind stored keys of any number."""
    num_blocks = 2 * sum(UNLIKE) // block_size + len(UNLIKE) + 1
    made = sequences([layer(**options)], block_size, num_blocks, dtype)
    run(made, [list(zip("abcdefghijklmnop", lengths, strict=False)) for lengths in (UNLIKE, UNLIKE[::-1])])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_queries_that_lie_head_by_head(block_size: int) -> None:
    run(sequences([layer(2)], block_size, backend=Turned))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_layers_of_which_only_some_are_served_in_pairs(block_size: int) -> None:
    run(sequences([layer(1), layer(2), layer(4, 32), layer(2, 128, window=70)], block_size))


@pytest.mark.parametrize("counts", [(5,), (70, 1, 0, 64), (0, 1, 1), tuple(range(0, 300, 7))])
def test_tiles_are_listed_with_most_keys_first(counts: tuple[int, ...]) -> None:
    """Rows with one new token, or none, have none; rows are compared four at a time, tiles listed two at a time."""
    draw = random.Random(0)
    starts, stored = [0, *accumulate(counts)], [draw.choice((0, 16, 32, draw.randrange(90))) for _ in counts]
    wanted = [
        (-(before + first + 16), row, [row, starts[row] + first, before + first, count - first])
        for row, (count, before) in enumerate(zip(counts, stored, strict=True))
        for first in range(0, count, 16)
        if count > 1
    ]
    lengths, most = [a + b for a, b in zip(counts, stored, strict=True)], len(wanted) + 3
    given = (torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in (starts, lengths))
    tiles = torch.full((most + 1, 4), -1, dtype=torch.int32, device=DEVICE)
    list_longest_first[(len(counts),)](*given, tiles, len(counts), most, QUERIES=16, ROWS=4, CHUNK=2)
    assert tiles[: len(wanted)].tolist() == [tile for _, _, tile in sorted(wanted)]
    assert tiles[most, 0] == len(wanted) and (tiles[len(wanted) : most] == -1).all()


def test_sequences_go_on_after_waiting_on_the_host() -> None:
    made = sequences([layer(2), layer(4, 32, window=9)], num_blocks=48)
    run(made, STEPS[:3])
    made.swap("a", "b")
    run(made, STEPS[3:])


@pytest.mark.parametrize("block_size", [16, 64])
def test_forks_share_full_blocks_and_go_on_from_a_copy(block_size: int) -> None:
    """Unused slots, copied along, hold NaN."""
    made = sequences([layer(2), layer(4, 32, window=9)], block_size)
    run(made, STEPS[:3])
    made.fork("b", 75, "x", "y")
    run(made, FORKED)
    made.free("b")
    run(made, [[("x", 1), ("y", 1)]])


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_blocks_behind_the_window_may_hold_anything(block_size: int) -> None:
    made, window = sequences([layer(2, window=40)], block_size, max(8, 512 // block_size)), 40
    run(made, [[("a", 150), ("b", 70)]])
    for rows in ([("a", 1), ("b", 1)], [("a", 9), ("b", 3)], [("a", 1), ("b", 1)]):
        for name, _ in rows:
            num_hidden = (made.stored[name].length - window + 1) // block_size
            made.backend.spoil(made.stored[name].blocks[:num_hidden])  # type: ignore[attr-defined]
        run(made, [rows])


@pytest.mark.parametrize("longest", [10, 600])
def test_rows_of_length_zero_touch_nothing(longest: int) -> None:
    made = sequences([layer(2)], block_size=64)
    made.step([("a", 4), ("b", longest)])
    for name in "ab":
        made._grow(name, 1)
    batch, (query, key, value) = made.batch([("a", 1), ("b", 1)]), list(made.draw(0, 3))
    end = torch.tensor([3], dtype=torch.int32)
    padded = replace(
        batch,
        query_start_loc=torch.cat([batch.query_start_loc, end]),
        seq_lens=torch.cat([batch.seq_lens, torch.zeros_like(end)]),
        positions=torch.cat([batch.positions, torch.zeros(1, dtype=torch.int64)]),
        block_table=torch.cat([batch.block_table, torch.zeros_like(batch.block_table[:1])]),
        slot_mapping=torch.cat([batch.slot_mapping, torch.tensor([-1])]),
        query_lens=(1, 1, 1),
        host_seq_lens=(*batch.host_seq_lens, 0),
    )
    made.backend.plan(padded)
    out = made.backend.forward(0, query, key, value)
    for row, name in enumerate("ab"):
        keys, values = made.stored[name].layers[0]
        both = torch.cat([keys, key[row : row + 1]]), torch.cat([values, value[row : row + 1]])
        wanted = dense(made.requirements.layers[0], query[row : row + 1], *both)
        assert (out[row] - wanted).abs().max() <= TOLERANCE


def test_lengths_that_are_bounds() -> None:
    """As a captured step with prompts has them: rows without tokens, tokens of nobody, the host knows no length."""
    made, rows = sequences([layer(2)], block_size=64), [("b", 70), ("a", 1), ("c", 3), ("d", 1), ("e", 129)]
    made.step([("a", 4), ("b", 90), ("d", 130)])
    for name, num_new in rows:
        made._grow(name, num_new)
    batch, lens = made.batch(rows), [num_new for _, num_new in rows]
    num, nobody = sum(lens), 60
    query, key, value = made.draw(0, num + nobody)
    ends = torch.full((3,), num, dtype=torch.int32)
    bounds = replace(
        batch,
        query_start_loc=torch.cat([batch.query_start_loc, ends]),
        seq_lens=torch.cat([batch.seq_lens, 0 * ends]),
        positions=torch.cat([batch.positions, torch.zeros(nobody, dtype=torch.int64)]),
        block_table=torch.cat([batch.block_table, torch.zeros_like(batch.block_table[:3])]),
        slot_mapping=torch.cat([batch.slot_mapping, torch.full((nobody,), -1)]),
        max_query_len=num + nobody,
        query_lens=(num + nobody,) * 8,
        host_seq_lens=(batch.max_seq_len,) * 8,
        lens_are_bounds=True,
    )
    made.backend.plan(bounds)
    out = made.backend.forward(0, query, key, value)[:num].split(lens)
    for (name, _), q, k, v, got in zip(rows, *(t[:num].split(lens) for t in (query, key, value)), out, strict=True):
        kept = made.stored[name].layers[0]
        wanted = dense(made.requirements.layers[0], q, torch.cat([kept[0], k]), torch.cat([kept[1], v]))
        assert (got - wanted).abs().max() <= TOLERANCE, name
