"""Seeded bugs of the attention kernels: file, what is right in it, what is wrong, cases, and which must fail."""

from __future__ import annotations

FLASH = "plugins/llmkit_attention/flash"
ATTENTION = "tests/attention/flash_cases.py"
FP8 = "tests/attention/flash_fp8_cases.py"
SHARED = "tests/attention/flash_shared_cases.py"
LAYERS = "tests/model/layer_kernel_cases.py"
WINDOWS = "shared_kv_heads_and_windows and 2-40"
ATTENTION_BUGS = {
    "a query sees the next key": (
        f"{FLASH}/prefill.py",
        "keys[None, :] <= position",
        "keys[None, :] <= 1 + position",
        ATTENTION,
        WINDOWS,
    ),
    "the window of a prompt is one too wide": (
        f"{FLASH}/prefill.py",
        "- window\n",
        "- window - 1\n",
        ATTENTION,
        WINDOWS,
    ),
    "the window of a decode is one too wide": (
        f"{FLASH}/decode.py",
        "length - window,",
        "length - window - 1,",
        ATTENTION,
        WINDOWS,
    ),
    "keys behind a row's end are seen": (
        f"{FLASH}/decode.py",
        "seen = offset <= ((now >> 2) & 63)",
        "seen = offset <= 63",
        ATTENTION,
        WINDOWS,
    ),
    "parts of a row are weighed alike": (
        f"{FLASH}/decode.py",
        "tl.exp2(logs - base[None, :])",
        "tl.where(held, 1.0, 0.0)",
        ATTENTION,
        "long_rows and None",
    ),
    "tiles that see equally many keys are listed in one place": (
        f"{FLASH}/prefill_list.py",
        " - (other < row).to(tl.int32)[None, :]",
        "",
        ATTENTION,
        "most_keys_first",
    ),
    "softcap is forgotten": (
        f"{FLASH}/tiles.py",
        "if SOFTCAP:",
        "if SOFTCAP and softcap > 1e9:",
        ATTENTION,
        "softcap and 0.7",
    ),
    "what e4m3 cannot hold becomes NaN in a store of its own": (
        f"{FLASH}/store.py",
        "narrowed(values, value_pool.dtype.element_ty)",
        "values",
        FP8,
        "cannot_hold and 1",
    ),
    "rows leave out a tile too many": (
        f"{FLASH}/decode.py",
        "mask=inside, other=0) * TILE\n",
        "mask=inside, other=0) * TILE + TILE * (index == 0)\n",
        SHARED,
        "several_groups and groups1 or long_prefixes",
    ),
    "a pack reaches as far as its last row": (
        f"{FLASH}/shared.py",
        "tl.atomic_min(reaches + mine, depth,",
        "tl.store(reaches + mine, depth,",
        SHARED,
        "all_their_rows_agree",
    ),
    "rows choose the fewest tiles": (
        f"{FLASH}/shared.py",
        "most = tl.maximum(saved, most)",
        "most = tl.where(saved >= most, 1 << 30, most)",
        SHARED,
        "most_is_saved",
    ),
    "rows in no pack leave out a tile": (
        f"{FLASH}/shared.py",
        "mask=depth > 0, other=0)",
        "mask=depth > 0, other=1)",
        SHARED,
        "beyond_the_most",
    ),
    "blocks in front of the one that tells groups apart are not compared": (
        f"{FLASH}/shared.py",
        "agree = tl.minimum(agree,",
        "agree = tl.maximum(agree,",
        SHARED,
        "copies_of_the_first",
    ),
    "shared parts are weighed alike": (
        f"{FLASH}/attend_shared.py",
        "tl.exp2(log - new_top)",
        "tl.exp2(log - log)",
        SHARED,
        "long_prefixes",
    ),
    "a row's own part is left out": (
        f"{FLASH}/attend_shared.py",
        "total = tl.full([AT_ONCE], 1.0, tl.float32)",
        "total = tl.full([AT_ONCE], 0.0, tl.float32)",
        SHARED,
        "long_prefixes",
    ),
    "one part of a pack is forgotten": (
        f"{FLASH}/attend_shared.py",
        "range(first, first + number)",
        "range(first, first + tl.maximum(number - 1, 1))",
        SHARED,
        "long_prefixes",
    ),
    "the members of a pack begin at the first one's": (
        f"{FLASH}/shared.py",
        "mine * MEMBERS + rank % MEMBERS",
        "mine * MEMBERS + rank % MEMBERS // 2",
        SHARED,
        "long_prefixes",
    ),
    "log-sum-exps of combined rows are natural": (
        f"{FLASH}/decode.py",
        "top + tl.log2(total)",
        "top + tl.log(total)",
        SHARED,
        "several_groups or long_prefixes",
    ),
}
