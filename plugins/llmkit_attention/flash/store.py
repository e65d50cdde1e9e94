"""Kernel that scatters a step's new keys and values into the pool."""

import triton
import triton.language as tl

from llmkit.cuda import narrowed, wait_for_previous


@triton.jit
def write_kv(
    key, value, slots, key_pool, value_pool,
    key_n, key_h, key_d, value_n, value_h, value_d,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, HEADS_PAD: tl.constexpr, DIM_PAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a token: [HEADS, DIM] of `key` and `value` to slot `slots[token]`; a negative slot stores nothing."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        head = tl.arange(0, HEADS_PAD)[:, None]
        dim = tl.arange(0, DIM_PAD)[None, :]
        real = (head < HEADS) & (dim < DIM)
        target = (((slot // PAGE) * HEADS + head) * PAGE + slot % PAGE) * DIM + dim
        keys = tl.load(key + token * key_n + head * key_h + dim * key_d, mask=real)
        values = tl.load(value + token * value_n + head * value_h + dim * value_d, mask=real)
        tl.store(key_pool + target, narrowed(keys, key_pool.dtype.element_ty), mask=real)
        tl.store(value_pool + target, narrowed(values, value_pool.dtype.element_ty), mask=real)
