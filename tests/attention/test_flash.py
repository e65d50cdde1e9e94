"""The Triton backend: its limits anywhere and, marked `cuda`, its kernels; elsewhere see `tests/kernels`."""

from __future__ import annotations

import pytest

from llmkit.interfaces.attention import AttentionRequirements, LayerSpec
from llmkit_attention import llmkit_select_attention
from llmkit_attention.flash.limits import reasons_against
from tests.kernels.running import run_cases


def requirements(
    device: str = "cuda", dtype: str = "bfloat16", block_size: int = 16, **spec: int
) -> AttentionRequirements:
    values = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, **spec}
    return AttentionRequirements(device, dtype, block_size, (LayerSpec(**values, scale=1.0),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("unfit", "reason"),
    [
        (requirements(device="cpu"), "device cpu is not cuda"),
        (requirements(dtype="float32"), "dtype float32"),
        (requirements(block_size=24), "block size 24 is not a power of two"),
        (requirements(num_heads=3), "3 query heads do not divide"),
        (requirements(head_dim=8), "head dimension 8"),
        (requirements(head_dim=512), "head dimension 512"),
    ],
)
def test_what_it_cannot_serve_it_says_and_leaves_to_sdpa(unfit: AttentionRequirements, reason: str) -> None:
    assert any(said.startswith(reason) for said in reasons_against(unfit))
    assert llmkit_select_attention(unfit) == "sdpa"


def test_bids_on_cuda_where_triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit_attention.flash.limits.find_spec", lambda name: object())
    assert llmkit_select_attention(requirements()) == "flash"
    monkeypatch.setattr("llmkit_attention.flash.limits.find_spec", lambda name: None)
    assert llmkit_select_attention(requirements()) == "sdpa"


@pytest.mark.cuda
def test_kernels_on_a_gpu() -> None:
    run_cases(*(f"tests/attention/flash{kind}_cases.py" for kind in ("", "_fp8", "_shared")))
