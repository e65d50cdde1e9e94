"""The cases of the kernels bite: with each of these seeded bugs they fail in the interpreter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kernels.attention_bugs import ATTENTION_BUGS
from tests.kernels.running import INTERPRETED, ROOT, run_cases

MODEL, SAMPLING = "llmkit/model", "llmkit/model/sampling"
LAYERS = "tests/model/layer_kernel_cases.py"
EXPERTS = "tests/model/expert_kernel_cases.py"
TILES = "tests/model/tile_kernel_cases.py"
SAMPLER = "tests/model/device_sampler_cases.py"
BUGS = ATTENTION_BUGS | {
    "experts read the pair's row instead of the token's": (
        f"{MODEL}/expert_kernels.py",
        "SHARED_BY=top_k if activation else 1",
        "SHARED_BY=1",
        EXPERTS,
        "test_experts and 64-24",
    ),
    "what e4m3 cannot hold becomes NaN": (
        "llmkit/cuda.py",
        "TYPE == tl.float8e4nv",
        "TYPE == tl.float16",
        LAYERS,
        "fewer_bits",
    ),
    "NaN is clamped": (
        "llmkit/cuda.py",
        "x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))",
        "x = tl.where(x > 448.0, 448.0, tl.where(x > -448.0, x, -448.0))",
        LAYERS,
        "fewer_bits",
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
