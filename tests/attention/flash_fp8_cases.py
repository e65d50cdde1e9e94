"""Keys and values stored as e4m3: attention must be that over keys and values rounded to e4m3.

Not collected by itself, as `flash_cases.py`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch

from llmkit.interfaces.attention import LayerSpec
from llmkit.interfaces.settings import Settings
from llmkit_attention.flash.settings import FlashSettings
from tests.attention.flash_cases import DEVICE, DTYPE, FORKED, HEADS, STEPS, TOLERANCE, OnDevice, Spoilt, layer, run
from tests.attention.sequences import Sequences, dense


class Narrow(FlashSettings):
    kv_dtype: Literal["auto", "fp8"] = "fp8"


class InE4M3(OnDevice):
    Settings: ClassVar[type[Settings]] = Narrow

    def spoil(self, blocks: list[int]) -> None:
        for pool in self._pools:
            pool.view(torch.uint8)[:, blocks] = 0x7F


def rounded(new: torch.Tensor) -> torch.Tensor:
    return new.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(new.dtype)


class Rounded(Spoilt):
    def kept(self, new: torch.Tensor) -> torch.Tensor:
        return rounded(new)


def sequences(layers: list[LayerSpec], block_size: int = 16, num_blocks: int = 40) -> Sequences:
    return Rounded(InE4M3, layers, DTYPE, block_size=block_size, num_blocks=num_blocks)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("ratio", HEADS)
def test_shared_kv_heads_and_windows(ratio: int, window: int | None) -> None:
    run(sequences([layer(ratio, window=window)]))


@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
def test_head_dimensions(head_dim: int) -> None:
    run(sequences([layer(4, head_dim)]))


def test_forks_share_full_blocks_and_go_on_from_a_copy() -> None:
    made = sequences([layer(2), layer(4, 32, window=9)])
    run(made, STEPS[:3])
    made.fork("b", 75, "x", "y")
    run(made, FORKED)


@pytest.mark.parametrize("block_size", [1, 64, 128])
def test_blocks_of_any_power_of_two_in_layers_that_differ(block_size: int) -> None:
    layers = [layer(2), layer(4, 32, window=9), layer(2, softcap=2.0)]
    run(sequences(layers, block_size, max(8, 512 // block_size)))


def test_long_rows_are_split_and_short_ones_beside_them() -> None:
    made = sequences([layer(4)], block_size=64)
    run(made, [[("long", 1100), ("short", 3)], [("long", 1), ("short", 1)], [("short", 1), ("new", 1), ("long", 1)]])


def test_sequences_go_on_after_waiting_on_the_host() -> None:
    made = sequences([layer(2), layer(4, 32, window=9)], num_blocks=48)
    run(made, STEPS[:3])
    made.swap("a", "b")
    run(made, STEPS[3:])


@pytest.mark.parametrize("num_new", [1, 3])
def test_what_e4m3_cannot_hold_and_nan(num_new: int) -> None:
    """Large numbers become the largest, infinite ones too; NaN stays NaN and in its own row."""
    made = sequences([layer(2)])
    made.step([("a", 4), ("b", 4)])
    rows = [("a", num_new), ("b", num_new)]
    for name, count in rows:
        made._grow(name, count)
    batch, (query, key, value) = made.batch(rows), [part.clone() for part in made.draw(0, 2 * num_new)]
    value[0, :, :3] = torch.tensor([1000.0, -1000.0, float("inf")])
    value[num_new] = float("nan")
    made.backend.plan(batch)
    out = made.backend.forward(0, query, key, value)
    keys, values = (
        torch.cat([old, rounded(new[:num_new])])
        for old, new in zip(made.stored["a"].layers[0], (key, value), strict=True)
    )
    wanted = dense(made.requirements.layers[0], query[:num_new], keys, values)
    assert wanted.abs().max() > 10
    assert ((out[:num_new] - wanted).abs() <= TOLERANCE * wanted.abs().clamp(min=1)).all()
    assert out[num_new:].isnan().all()


def test_a_block_takes_half_the_memory() -> None:
    made, plain = sequences([layer(2), layer(4, 32)]).backend, OnDevice
    wide = Spoilt(plain, list(made.requirements.layers), DTYPE, block_size=16, num_blocks=40).backend
    assert 2 * made.bytes_per_block() == wide.bytes_per_block()
    taken = sum(pool.numel() * pool.element_size() for pool in made._pools)  # type: ignore[attr-defined]
    assert taken == 40 * made.bytes_per_block() and made._pools[0].device.type == DEVICE.type  # type: ignore[attr-defined]
