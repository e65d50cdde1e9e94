"""The table of where a decode step's time goes, from a trace as the profiler writes it; and the step, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.profile_gpu import (
    ATTENTION,
    BETWEEN,
    HEAD,
    PRODUCTS,
    REST,
    by_kind,
    by_name,
    decode_plan,
    kernels_of,
    kind_of,
    main,
    shape_of,
    table,
)
from llmkit import SamplingParams
from tests.tiny_llm import VOCAB_SIZE, tiny

STEP = [
    ("Memcpy HtoD (Pinned -> Device)", 1.0),
    ("void at::native::indexSelectSmallIndex<...>", 2.0),
    ("list_tiles", 4.0),
    ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", 8.0),
    ("_norm_and_rotate", 16.0),
    ("attend_one", 32.0),
    ("void cublasLt::splitKreduce_kernel<32, 16, int>", 64.0),
    ("_multiply_tiles", 128.0),
    ("_add_rms_norm", 256.0),
    ("gemvx::kernel<int, int, __nv_bfloat16>", 512.0),
    ("void cublasLt::splitKreduce_kernel<32, 16, int>", 1024.0),
    ("weigh_blocks", 2048.0),
    ("choose", 4096.0),
    ("Memcpy DtoD (Device -> Device)", 8192.0),
]


def test_kinds_add_up_and_the_head_is_the_last_product_with_what_follows() -> None:
    took = by_kind(STEP)
    assert took == {
        ATTENTION: 4.0 + 32.0,
        PRODUCTS: 8.0 + 64.0 + 128.0,
        BETWEEN: 16.0 + 256.0,
        HEAD: 512.0 + 1024.0 + 2048.0 + 4096.0 + 8192.0,
        REST: 1.0 + 2.0,
    }
    assert sum(took.values()) == sum(microseconds for _, microseconds in STEP)


def test_a_soft_cap_belongs_to_the_head() -> None:
    capped = [*STEP[:11], ("void at::native::vectorized_elementwise_kernel<4, tanh>", 3.0), *STEP[11:]]
    assert by_kind(capped)[HEAD] == by_kind(STEP)[HEAD] + 3.0
    assert by_kind(STEP[:3])[HEAD] == 0.0, "without a choice there is no head"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64>>", ATTENTION),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>", ATTENTION),
        ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<>", ATTENTION),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<>", BETWEEN),
        ("ampere_bf16_s16816gemm_bf16_64x64_sliced1x2_ldg8_f2f_stages_64x6_tn", PRODUCTS),
        ("void at::native::elementwise_kernel<128, 4>", REST),
    ],
)
def test_kernels_of_libraries_are_known_by_their_parts(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_trace_gives_what_ran_on_the_device_in_order() -> None:
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": "b", "ts": 20.5, "dur": 3},
        {"ph": "X", "cat": "gpu_memcpy", "name": "a", "ts": 10.0, "dur": 1.5},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1.0, "dur": 50},
        {"ph": "M", "name": "process_name", "ts": 0.0},
    ]
    assert kernels_of({"traceEvents": events}) == [("a", 1.5), ("b", 3.0)]


def test_the_tables() -> None:
    lines = table([(1, 512), (64, 900)], [(STEP, 1234.5), (STEP[:8], 7.0)])
    assert lines[0] == "| us of a replay | 1 row of 512 | 64 rows of 900 |"
    assert lines[2] == "| attention over the keys | 36 | 36 |"
    assert lines[-2:] == ["| the rest | 3 | 3 |", "| replay | 1,234 | 7 |"]
    assert by_name(STEP)[3:5] == [
        f"| choose | {HEAD} | 1 | 4,096.0 |",
        f"| weigh_blocks | {HEAD} | 1 | 2,048.0 |",
    ]
    assert f"| void cublasLt::splitKreduce_kernel<32, 16, int> | {PRODUCTS} | 2 | 1,088.0 |" in by_name(STEP)


def test_the_step_decodes_behind_all_its_context(make_llm: Any) -> None:
    """Its tokens are those of the same prompts, run as anybody would."""
    llm = make_llm(tiny(), num_blocks=64)
    plan = decode_plan(llm, 3, 10)
    assert [(row.slot, row.start, row.num_tokens, row.samples) for row in plan.scheduled] == [
        (slot, 9, 1, True) for slot in range(3)
    ]
    held = llm.engine.executor.tokens
    prompts = held[:3, :10].tolist()
    assert len({tuple(prompt) for prompt in prompts}) == 3 and 0 <= held.min() <= held.max() < VOCAB_SIZE
    chosen = llm.engine.executor.launch(plan).wait().token_ids
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    assert [[token] for token in chosen] == [list(output.token_ids) for output in outputs]
    with pytest.raises(SystemExit, match=r"^9x100 takes 234 KV blocks, the pool has 64$"):
        decode_plan(llm, 9, 100)


def test_shapes_are_rows_and_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert shape_of("64x512") == (64, 512)
    for wrong in ("64", "0x5", "axb", "4x1"):
        with pytest.raises(SystemExit):
            main([wrong])
        assert f"invalid shape_of value: {wrong!r}" in capsys.readouterr().err


@pytest.mark.cuda
def test_a_replay_on_the_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    main(["1x64", "20x100", "--repeats", "3", "--kernels", "--out", str(tmp_path / "table.md")])
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith(f"| {ATTENTION} | ")]
    assert all(float(cell.replace(",", "")) > 0 for cell in rows[0].strip("|").split("|")[1:])
    assert (tmp_path / "table.md").read_text() == text and torch.cuda.get_device_name() in text
