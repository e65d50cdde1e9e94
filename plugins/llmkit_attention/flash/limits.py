"""What the kernels can serve, and what pays. Imports neither torch nor triton, so that asking costs nothing."""

from __future__ import annotations

import os
from importlib.util import find_spec

from llmkit.interfaces.attention import AttentionRequirements, LayerSpec

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = range(16, 257)
PAYS_BYTES = 24 << 20
"""Bytes of a layer that must not be read twice: about what a GPU reads while one more kernel starts and merges."""


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reasons_against(requirements: AttentionRequirements) -> list[str]:
    """Why the kernels cannot serve `requirements`; empty if they can."""
    reasons = []
    if requirements.device != "cuda" and not is_interpreted():
        reasons.append(f"device {requirements.device} is not cuda")
    if find_spec("triton") is None:
        reasons.append("triton is not installed")
    if requirements.dtype not in DTYPES:
        reasons.append(f"dtype {requirements.dtype} is not one of {DTYPES}")
    if requirements.block_size & (requirements.block_size - 1):
        reasons.append(f"block size {requirements.block_size} is not a power of two")
    return reasons + [reason for layer in dict.fromkeys(requirements.layers) for reason in _against(layer)]


def _against(layer: LayerSpec) -> list[str]:
    reasons = []
    if layer.num_heads % layer.num_kv_heads:
        reasons.append(f"{layer.num_heads} query heads do not divide into {layer.num_kv_heads} KV heads")
    if layer.head_dim not in HEAD_DIMS:
        reasons.append(f"head dimension {layer.head_dim} is not within {HEAD_DIMS.start} to {HEAD_DIMS.stop - 1}")
    return reasons


def pays(spec: LayerSpec, num_repeated_keys: int, itemsize: int) -> bool:
    """Whether a second pass is worth its launch in a layer whose rows repeat so many keys. A window moves on, so that
    its rows soon have nothing in common: they never share."""
    repeated = 2 * num_repeated_keys * spec.num_kv_heads * spec.head_dim * itemsize
    return spec.window is None and repeated >= PAYS_BYTES
