"""The cases of the kernels bite: with each of these seeded bugs they fail in the interpreter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kernels.running import INTERPRETED, ROOT, run_cases

FLASH, MODEL, SAMPLING = "plugins/llmkit_attention/flash", "llmkit/model", "llmkit/model/sampling"
ATTENTION, LAYERS = "tests/attention/flash_cases.py", "tests/model/layer_kernel_cases.py"
EXPERTS = "tests/model/expert_kernel_cases.py"
TILES = "tests/model/tile_kernel_cases.py"
FP8 = "tests/attention/flash_fp8_cases.py"
SHARED = "tests/attention/flash_shared_cases.py"
SAMPLER = "tests/model/device_sampler_cases.py"
WINDOWS = "shared_kv_heads_and_windows and 2-40"
BUGS = {
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
    "softcap is forgotten": (
        f"{FLASH}/tiles.py",
        "if SOFTCAP:",
        "if SOFTCAP and softcap > 1e9:",
        ATTENTION,
        "softcap and 0.7",
    ),
    "what e4m3 cannot hold becomes NaN": (
        "llmkit/cuda.py",
        "TYPE == tl.float8e4nv",
        "TYPE == tl.float16",
        LAYERS,
        "fewer_bits",
    ),
    "what e4m3 cannot hold becomes NaN in a store of its own": (
        f"{FLASH}/store.py",
        "narrowed(values, value_pool.dtype.element_ty)",
        "values",
        FP8,
        "cannot_hold and 1",
    ),
    "NaN is clamped": (
        "llmkit/cuda.py",
        "x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))",
        "x = tl.where(x > 448.0, 448.0, tl.where(x > -448.0, x, -448.0))",
        LAYERS,
        "fewer_bits",
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
    "the sum of a norm is not the one stored": (
        f"{MODEL}/layer_kernels.py",
        "tl.sum(value * value, 0) / width",
        "tl.sum(value * value, 0) / BLOCK",
        LAYERS,
        "add_rms_norm",
    ),
    "the rotation has the other partner's sign": (
        f"{MODEL}/layer_kernels.py",
        "x * cosine + y * sine",
        "x * cosine - y * sine",
        LAYERS,
        "norm_and_rotate",
    ),
    "gate and up are swapped": (
        f"{MODEL}/layer_kernels.py",
        "gated(gate, up, ACTIVATION)",
        "gated(up, gate, ACTIVATION)",
        LAYERS,
        "activate",
    ),
    "the cube of a gate is forgotten": (
        f"{MODEL}/gate_kernel.py",
        "0.044715 * gate * gate * gate",
        "0.0 * gate",
        LAYERS,
        "activate and gelu",
    ),
    "what is added has the other norm": (
        f"{MODEL}/layer_kernels.py",
        "tl.load(delta_weight + column",
        "tl.load(weight + column",
        LAYERS,
        "may_be_normalised",
    ),
    "numbers that do not turn are turned": (
        f"{MODEL}/layer_kernels.py",
        "turns = column < rotary_dim",
        "turns = column < head_dim",
        LAYERS,
        "behind_the_rotary",
    ),
    "a norm is taken without its last part": (
        f"{MODEL}/tile_kernels.py",
        "(part < PARTS)",
        "(part < PARTS - 1)",
        TILES,
        "of_a_norm and 64-64-16",
    ),
    "only one part of the width is added up": (
        f"{MODEL}/tile_kernels.py",
        "tl.static_range(SPLITS)",
        "tl.static_range(1)",
        TILES,
        "added_alike",
    ),
    "counts of parts are left behind": (
        f"{MODEL}/tile_kernels.py",
        "tl.store(arrivals + number, 0)",
        "tl.store(arrivals + number, 1)",
        TILES,
        "added_alike",
    ),
    "gates of a tile take their neighbours": (
        f"{MODEL}/tile_kernels.py",
        "(2, HALF, ROWS)), (1, 2, 0)",
        "(HALF, 2, ROWS)), (0, 2, 1)",
        TILES,
        "of_a_norm and True-64-64-16",
    ),
    "squares are those of the scaled numbers": (
        f"{MODEL}/tile_kernels.py",
        "tl.sum(value * value, 0)",
        "tl.sum(value * value * gains[:, None], 0)",
        TILES,
        "its_norm and 64-64-16",
    ),
    "an expert takes its neighbour's tile": (
        f"{MODEL}/expert_kernels.py",
        "tl.sum((ends <= tile)",
        "tl.sum((ends < tile)",
        EXPERTS,
        "test_experts and 64-24",
    ),
    "the second tile of an expert begins like its first": (
        f"{MODEL}/expert_kernels.py",
        "(tile - first) * TOKENS +",
        "0 * TOKENS +",
        EXPERTS,
        "test_experts and 64-48",
    ),
    "experts read the pair's row instead of the token's": (
        f"{MODEL}/expert_kernels.py",
        "SHARED_BY=top_k if activation else 1",
        "SHARED_BY=1",
        EXPERTS,
        "test_experts and 64-24",
    ),
    "weights are not made to sum to 1": (
        f"{MODEL}/expert_kernels.py",
        "if NORMALISES:",
        "if NORMALISES and num_experts < 0:",
        EXPERTS,
        "test_route",
    ),
    "there is no tile for what fills no tile": (
        f"{MODEL}/expert_kernels.py",
        "min(num_experts, rows * top_k) + rows",
        "rows",
        EXPERTS,
        "test_experts and 64-24",
    ),
    "blocks are weighed by their own maximum": (
        f"{SAMPLING}/device_draw.py",
        "mass = mass * weights_of(tops_of_row, top, temperature)",
        "mass = mass * 1.0",
        SAMPLER,
        "cpu_chooses",
    ),
    "both draws share a number": (
        f"{SAMPLING}/device_draw.py",
        "2 * position + 2",
        "2 * position + 1",
        SAMPLER,
        "cpu_chooses",
    ),
    "greedy takes the highest of equals": (
        f"{SAMPLING}/device_draw.py",
        "tl.min(tl.where(is_top, index, SIZE - 1), 0)",
        "tl.max(tl.where(is_top, index, 0), 0)",
        SAMPLER,
        "lowest_of_equals",
    ),
    "a broken row is not told": (
        f"{SAMPLING}/device_draw.py",
        'tl.where((total > 0.0) & (total < float("inf")), total, float("nan"))',
        "1.0 + 0 * tl.minimum(total, 0.0)",
        SAMPLER,
        "broken",
    ),
    "top-k keeps a few too many": (
        f"{SAMPLING}/device_nucleus.py",
        "top_k.to(tl.float64)",
        "(top_k + 9).to(tl.float64)",
        SAMPLER,
        "filters and 97",
    ),
    "top-p keeps whole ties": (
        f"{SAMPLING}/device_nucleus.py",
        "kept = reached - _number(reached - wanted, equals, weight) * weight",
        "kept = reached",
        SAMPLER,
        "filters and 97",
    ),
    "min-p is forgotten": (
        f"{SAMPLING}/device_nucleus.py",
        "kept = tl.minimum(kept, likely)",
        "kept = tl.minimum(kept, likely * 1e9)",
        SAMPLER,
        "filters and 97",
    ),
}


@pytest.mark.slow
@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_kernels_are_found(bug: str, tmp_path: Path) -> None:
    file, right, wrong, cases, select = BUGS[bug]
    for folder in ("llmkit", "plugins", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = (tmp_path / file).read_text()
    assert right in source, f"{file} has no {right!r} any more"
    (tmp_path / file).write_text(source.replace(right, wrong))
    with pytest.raises(AssertionError, match=r"\d+ failed"):
        run_cases(cases, select=select, environment=INTERPRETED, project=tmp_path)
