"""The kernels between a fused layer's products against float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmkit.interfaces.attention import KeyValueSlots
from llmkit.model import layer_kernels as kernels
from llmkit.model.row_kernels import MAX_ROWS, WHOLE_WIDTH, multiply_rows
from llmkit.model.structure import ACTIVATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert float((got.double() - wanted).norm() / wanted.norm()) <= TOLERANCE[got.dtype]


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x.double(), weight.shape, weight.double(), epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 64, 320, 1000])
@pytest.mark.parametrize("adds", [True, False])
def test_add_rms_norm(dtype: torch.dtype, width: int, adds: bool) -> None:
    x, weight = noise(5, width, dtype=dtype), noise(width, dtype=dtype, seed=1)
    delta = noise(5, width, dtype=dtype, seed=2) if adds else None
    total, normed = kernels.add_rms_norm(x, delta, (weight, 1e-3))
    wanted = x + delta if delta is not None else x
    assert torch.equal(total, wanted)
    close(normed, rms(wanted, weight, 1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 1000])
def test_what_is_added_may_be_normalised(dtype: torch.dtype, width: int) -> None:
    """With gains in float32, as Gemma's are."""
    x, delta = noise(5, width, dtype=dtype), 0.01 * noise(5, width, dtype=dtype, seed=2)
    weight, of_delta = (1 + noise(width, dtype=torch.float32, seed=seed) / 4 for seed in (1, 3))
    total, normed = kernels.add_rms_norm(x, delta, (weight, 1e-3), (of_delta, 1e-5))
    close(total, x.double() + rms(delta, of_delta, 1e-5))
    close(normed, rms(total, weight, 1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (1, 1, 8), (6, 3, 80), (5, 1, 128)])
@pytest.mark.parametrize("norms", [True, False])
def test_norm_and_rotate(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, norms: bool) -> None:
    qkv = noise(3, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    cos, sin = (noise(3, 1, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    q_norm, k_norm = [(noise(head_dim, dtype=dtype, seed=seed), 1e-3) if norms else None for seed in (3, 4)]
    got = kernels.norm_and_rotate(qkv, num_heads, num_kv_heads, q_norm, k_norm, cos, sin)
    query, key = qkv[:, :num_heads].double(), qkv[:, num_heads : num_heads + num_kv_heads].double()
    if q_norm is not None and k_norm is not None:
        query, key = rms(query, *q_norm), rms(key, *k_norm)
    plain = torch.cat([query, key], dim=1)
    close(got, plain * cos + plain.roll(head_dim // 2, -1) * sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 16), (80, 20), (8, 2)])
def test_numbers_behind_the_rotary_ones_stay(dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    qkv = noise(3, 6, head_dim, dtype=dtype)
    cos, sin = (noise(3, 1, rotary_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    got = kernels.norm_and_rotate(qkv, 3, 1, None, None, cos, sin)
    turned = qkv[:, :4, :rotary_dim].double()
    close(got[..., :rotary_dim], turned * cos + turned.roll(rotary_dim // 2, -1) * sin)
    assert torch.equal(got[..., rotary_dim:], qkv[:, :4, rotary_dim:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 864, 1024, 3000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate_and_multiply(dtype: torch.dtype, width: int, activation: str) -> None:
    gate_up = noise(4, 2 * width, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(kernels.activate_and_multiply(gate_up, activation), ACTIVATIONS[activation](gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [True, False])
def test_keys_and_values_go_to_their_slots_and_to_no_other(dtype: torch.dtype, norms: bool) -> None:
    num_heads, num_kv_heads, head_dim, page = 4, 3, 80, 4
    qkv = noise(4, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    cos, sin = (noise(4, 1, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    places = torch.tensor([9, -1, 0, 7], device=DEVICE)
    pools = torch.full((2, 3, num_kv_heads, page, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    slots = KeyValueSlots(pools[0], pools[1], places)
    q_norm, k_norm = [(noise(head_dim, dtype=dtype, seed=seed), 1e-3) if norms else None for seed in (3, 4)]
    both = kernels.norm_and_rotate(qkv, num_heads, num_kv_heads, q_norm, k_norm, cos, sin)
    query = kernels.norm_and_rotate(qkv, num_heads, num_kv_heads, q_norm, k_norm, cos, sin, slots)
    assert torch.equal(query, both[:, :num_heads])
    by_slot = pools.transpose(2, 3).reshape(2, 3 * page, num_kv_heads, head_dim)
    for row, place in ((0, 9), (2, 0), (3, 7)):
        assert torch.equal(by_slot[0, place], both[row, num_heads:])
        assert torch.equal(by_slot[1, place], qkv[row, num_heads + num_kv_heads :])
    untouched = [place for place in range(3 * page) if place not in (0, 7, 9)]
    assert by_slot[:, untouched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_of_fewer_bits_take_the_nearest_number(dtype: torch.dtype) -> None:
    """e4m3 ends at 448: what is larger is stored as that, and NaN as NaN."""
    qkv = 100 * noise(3, 5, 64, dtype=dtype)
    cos, sin, places = torch.ones_like(qkv[:, :1]), torch.zeros_like(qkv[:, :1]), torch.tensor([5, 0, 2], device=DEVICE)
    qkv[0, 3, :2], qkv[1, 4, 5], qkv[2, 4, :2] = 1e4, float("nan"), float("-inf")
    pools = torch.zeros(2, 2, 1, 4, 64, dtype=torch.float8_e4m3fn, device=DEVICE)
    kernels.norm_and_rotate(qkv, 3, 1, None, None, cos, sin, KeyValueSlots(pools[0], pools[1], places))
    got = pools.float().view(2, 8, 64)[:, places].transpose(0, 1)
    wanted = qkv[:, 3:].float().clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(got.nan_to_num(nan=9.0), wanted.nan_to_num(nan=9.0)) and wanted.isnan().sum() == 1
    assert got[0, 0, 0] == 448 and got[2, 1, 0] == -448


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS])
@pytest.mark.parametrize(("width", "outputs"), [(64, 40), (1000, 7), (WHOLE_WIDTH + 72, 20)])
def test_products_of_few_rows(dtype: torch.dtype, rows: int, width: int, outputs: int) -> None:
    x, weight = noise(rows, width, dtype=dtype), noise(2 * outputs, width, dtype=dtype, seed=1)
    bias, norm = noise(2 * outputs, dtype=dtype, seed=2), (noise(width, dtype=dtype, seed=3), 1e-3)
    residual = noise(rows, 2 * outputs, dtype=dtype, seed=4)
    plain = x.double() @ weight.double().T
    close(multiply_rows(x, (weight, None)), plain)
    close(multiply_rows(x, (weight, bias), residual=residual), plain + bias + residual)
    gate, up = (rms(x, *norm) @ weight.double().T + bias).chunk(2, dim=-1)
    close(multiply_rows(x, (weight, bias), norm=norm, gated=True), F.silu(gate) * up)
