"""The Triton backend: its limits anywhere and, marked `cuda`, its kernels; elsewhere see `tests/kernels`."""

from __future__ import annotations

import pytest
import torch

from llmkit.config import choose
from llmkit.errors import ConfigError
from llmkit.interfaces.attention import AttentionRequirements, LayerSpec
from llmkit.plugins import load_plugins
from llmkit_attention import llmkit_select_attention
from llmkit_attention.flash.backend import FlashAttention
from llmkit_attention.flash.limits import pays, reasons_against
from llmkit_attention.flash.settings import FlashSettings
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


def backend(kv_dtype: str) -> FlashAttention:
    settings = FlashSettings.model_validate({"kv_dtype": kv_dtype})
    return FlashAttention(settings, requirements(num_kv_heads=4), torch.bfloat16, torch.device("cuda"))


def test_fp8_takes_half_the_memory_and_pays_from_twice_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.cuda._capability", lambda index: (8, 9))
    wide, narrow = backend("auto"), backend("fp8")
    assert wide.bytes_per_block() == 2 * narrow.bytes_per_block() == 16 * 2 * 4 * 64 * 2
    enough = (24 << 20) // (2 * 4 * 64 * 2)
    assert wide.reads_once(enough) and not wide.reads_once(enough - 1)
    assert narrow.reads_once(2 * enough) and not narrow.reads_once(2 * enough - 1)


def test_layers_with_a_window_read_nothing_once() -> None:
    assert not any(pays(LayerSpec(4, 4, 64, 1.0, window=window), 1 << 40, 2) for window in (1, 4096))


def test_fp8_is_refused_by_name_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.cuda._capability", lambda index: (8, 0))
    assert backend("auto").stored_dtype is torch.bfloat16
    with pytest.raises(ConfigError, match=r"kv_dtype=fp8 needs .* capability 8\.9 or higher; choose auto"):
        backend("fp8")
    registry = load_plugins()[0]
    assert set(registry.get("attention", "flash").settings.model_fields) == {"kv_dtype"}
    with pytest.raises(ConfigError, match=r"kv_dtype='fp16'.*auto.*fp8"):
        choose(registry, "attention", {"name": "flash", "kv_dtype": "fp16"})


@pytest.mark.cuda
def test_kernels_on_a_gpu() -> None:
    run_cases(*(f"tests/attention/flash{kind}_cases.py" for kind in ("", "_fp8", "_shared")))
