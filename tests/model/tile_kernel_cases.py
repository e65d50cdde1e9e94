"""Products by tiles of weights against float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmkit.model.tile_kernels import MAX_ROWS, Normed, Tiling, multiply, multiply_and_norm, tiling
from tests.model.layer_kernel_cases import DTYPES, close, noise, rms

ROWS = [1, 16, 21, 64, 75]
SHAPES = [(64, 64), (96, 1000), (200, 1600), (40, 128)]
"""Features and width: a part of a tile, no multiple of what is read at once, several parts of the width."""


def weights(features: int, width: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None]:
    weight = (noise(features, width, dtype=torch.float32, seed=1) * width**-0.5).to(dtype)
    return weight, noise(features, dtype=dtype, seed=2) if bias else None


def product(x: Tensor, pair: tuple[Tensor, Tensor | None]) -> Tensor:
    return F.linear(x.double(), pair[0].double(), None if pair[1] is None else pair[1].double())


def normed_of(x: Tensor, gain: Tensor, epsilon: float) -> Normed:
    """The norm of `x` as a product would have left it, its squares in three parts."""
    squares = torch.stack([part.float().square().sum(1) for part in x.tensor_split(3, 1)], 1)
    return Normed((x.float() * gain.float()).to(x.dtype), squares.contiguous(), epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("features", "width"), SHAPES)
def test_a_sum_and_its_norm(dtype: torch.dtype, rows: int, features: int, width: int) -> None:
    x, pair = noise(rows, width, dtype=dtype), weights(features, width, dtype, bias=rows % 2 == 0)
    residual, gain = noise(rows, features, dtype=dtype, seed=3), noise(features, dtype=dtype, seed=4)
    total, normed = multiply_and_norm(x, pair, residual, (gain, 1e-3))
    close(total, product(x, pair) + residual)
    close(normed.scaled, total.double() * gain)
    assert normed.epsilon == 1e-3
    assert torch.allclose(normed.squares.double().sum(1), total.double().square().sum(1), rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("features", "width"), SHAPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_product_of_a_norm(dtype: torch.dtype, rows: int, features: int, width: int, gated: bool) -> None:
    x, gain = noise(rows, width, dtype=dtype), noise(width, dtype=dtype, seed=5)
    pair = weights(features, width, dtype, bias=rows % 2 == 1)
    wanted = product(rms(x, gain, 1e-2).to(torch.float64), pair)
    if gated:
        gate, up = wanted.chunk(2, dim=1)
        wanted = F.silu(gate) * up
    close(multiply(normed_of(x, gain, 1e-2), pair, gated=gated), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_width_are_added_alike_every_time(dtype: torch.dtype) -> None:
    x, pair = noise(20, 1600, dtype=dtype), weights(72, 1600, dtype, bias=False)
    assert tiling(20, 72, 1600).splits > 1
    first = multiply(x, pair)
    close(first, product(x, pair))
    assert all(torch.equal(multiply(x, pair), first) for _ in range(3))


def test_rows_do_not_depend_on_each_other() -> None:
    """A row of NaN stays alone, also where it is the last and read again."""
    dtype = torch.float16
    x, pair = noise(19, 320, dtype=dtype), weights(100, 320, dtype, bias=False)
    wanted = multiply(x, pair)
    x[18] = float("nan")
    got = multiply(x, pair)
    assert torch.equal(got[:18], wanted[:18]) and got[18].isnan().all()


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, MAX_ROWS])
@pytest.mark.parametrize(("features", "width"), [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (64, 64)])
def test_every_part_of_the_width_has_something_to_read(rows: int, features: int, width: int) -> None:
    cut = tiling(rows, features, width)
    share = -(-width // (cut.chunk * cut.splits)) * cut.chunk
    assert isinstance(cut, Tiling) and (cut.splits - 1) * share < width
