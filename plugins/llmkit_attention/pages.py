"""KV pools as other libraries' kernels want them, [num_blocks, block_size, num_kv_heads, head_dim] for keys and values.

Those kernels may load slots behind a row's keys and multiply them by 0. So nothing that is not a finite number is ever
stored: NaN and infinities of a row that went wrong become finite here (its hidden states stay wrong), so that no block
needs clearing. A pool has a block more than asked for, where tokens without a slot go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from llmkit.interfaces.attention import AttentionBackend, AttentionRequirements
from llmkit_attention.host import HostBlocks

DTYPES = ("bfloat16", "float16")


class PagedBackend(AttentionBackend):
    """Stores and copies blocks; what is derived from it attends."""

    def bytes_per_block(self) -> int:
        per_token = sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.requirements.layers)
        return per_token * self.requirements.block_size * self.dtype.itemsize

    def allocate(self, num_blocks: int) -> None:
        block_size = self.requirements.block_size
        self._spare_slot = num_blocks * block_size
        self._pools = [
            torch.zeros(
                (2, num_blocks + 1, block_size, layer.num_kv_heads, layer.head_dim),
                dtype=self.dtype,
                device=self.device,
            )
            for layer in self.requirements.layers
        ]

    def allocate_host(self, num_blocks: int) -> bool:
        self._host = HostBlocks(self._pools, num_blocks)
        return True

    def save_blocks(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        self._host.save(blocks, host_blocks)

    def restore_blocks(self, host_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        self._host.restore(host_blocks, blocks)

    def real_slots(self, slot_mapping: torch.Tensor) -> torch.Tensor:
        """`slot_mapping` int64 [N] with the spare block's first slot in place of negative ones."""
        return torch.where(slot_mapping < 0, self._spare_slot, slot_mapping)

    def store(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Keys and values [N, num_kv_heads, head_dim] into `slots`; returns the layer's pool [2, blocks, ...]."""
        pool = self._pools[layer]
        for half, new in zip(pool, (key, value), strict=True):
            half.flatten(0, 1).index_copy_(0, slots, torch.nan_to_num(new))
        return pool


def reasons_against(requirements: AttentionRequirements, missing: Iterable[str], head_dims: Iterable[int]) -> list[str]:
    """Why kernels for CUDA, half precision and heads of `head_dims` cannot serve; first what is `missing`."""
    reasons = list(missing)
    if requirements.device != "cuda":
        reasons.append(f"device {requirements.device} is not cuda")
    if requirements.dtype not in DTYPES:
        reasons.append(f"dtype {requirements.dtype} is not one of {DTYPES}")
    for layer in dict.fromkeys(requirements.layers):
        if layer.num_heads % layer.num_kv_heads:
            reasons.append(f"{layer.num_heads} query heads do not divide into {layer.num_kv_heads} KV heads")
        if layer.head_dim not in head_dims:
            reasons.append(f"head dimension {layer.head_dim} is not one of {_short(head_dims)}")
    return reasons


def _short(numbers: Iterable[int]) -> str:
    """A range by its ends and step, anything else in full."""
    if isinstance(numbers, range):
        return f"{numbers.start}, {numbers.start + numbers.step} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
