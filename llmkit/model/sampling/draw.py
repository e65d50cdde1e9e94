"""From logits to token ids: the argmax, and exact sampling in two levels.

Both report a value per row that is finite exactly if the row had something to choose from, so that broken rows
cost no extra pass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmkit.model.sampling.chunks import chunks


def block_size_for(vocab_size: int) -> int:
    """Tokens per block of the two-level draw: a power of two near the root of the vocabulary."""
    return 1 << ((vocab_size - 1).bit_length() + 1) // 2


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Index and value of each row's maximum, the lowest index among equals; NaN wins. `logits` [R, V].

    Returns int64 [R] and a float [R] that is finite unless the row holds NaN or +inf, or nothing but -inf.
    """
    if logits.device.type != "cpu":
        values, ids = logits.max(dim=-1)
        return ids, values
    # numpy's argmax uses vector instructions: about ten times faster than torch's on a CPU.
    if logits.dtype in (torch.float32, torch.float64):
        ids = torch.from_numpy(logits.detach().numpy().argmax(-1))
    else:
        parts = (logits[part].detach().float() for part in chunks(logits))
        ids = torch.from_numpy(np.concatenate([part.numpy().argmax(-1) for part in parts]))
    return ids, logits.gather(-1, ids[:, None])[:, 0]


def draw(scaled: Tensor, uniforms: Tensor, block_size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Sample each row of softmax(`scaled`): a block by inverse CDF, then a token inside it, likewise.

    `scaled` [R, W] are logits over temperature, W a multiple of `block_size`, -inf from `vocab_size` on;
    `uniforms` float64 [2, R, 1]. Nothing but one softmax and one sum touches the whole vocabulary. Tokens at -inf are
    never drawn. Returns int64 [R] below `vocab_size`, and float64 [R], NaN for rows without a distribution.
    """
    num_rows, width = scaled.shape
    num_blocks = width // block_size
    for_block, for_token = uniforms.unbind()
    blocks = torch.softmax(scaled, dim=-1).view(num_rows * num_blocks, block_size)
    outer = blocks.sum(-1).view(num_rows, num_blocks).cumsum(-1, dtype=torch.float64)
    total = outer[:, -1:]
    # A row of NaN finds no block; the clamps keep it inside the row and change no other.
    block = torch.searchsorted(outer, for_block * total, right=True).clamp_(max=num_blocks - 1)
    first = torch.arange(0, num_rows * num_blocks, num_blocks, device=scaled.device)
    inner = blocks.index_select(0, first + block[:, 0]).cumsum(-1, dtype=torch.float64)
    offset = torch.searchsorted(inner, for_token * inner[:, -1:], right=True)
    return offset.add_(block, alpha=block_size).clamp_(max=vocab_size - 1)[:, 0], total[:, 0]
