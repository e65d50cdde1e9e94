"""The kernels between a fused layer's products against float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmkit.model import layer_kernels as kernels

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
@pytest.mark.parametrize("width", [1, 864, 1024, 3000])
def test_silu_and_multiply(dtype: torch.dtype, width: int) -> None:
    gate_up = noise(4, 2 * width, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(kernels.silu_and_multiply(gate_up), F.silu(gate) * up)
