"""`benchmarks/draw_gpu.py` draws what the tables say, and the committed ones can be drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PEERS = """# Peers

| model | workload | counted | vLLM | nano-vllm | floor |
|---|---|---|---:|---:|---:|
| qwen3_0_6b | many | output tok/s | 3,000 | - | 8,000 to 10,000 |
| qwen3_0_6b | long | input tok/s | 10 | 20 | 100 |
| qwen3_0_6b | not run | output tok/s | 1 | 2 | 4 |

| heads | rows x context | FlashAttention-3, us a layer |
|---|---|---:|
| 32/8 | 64 x 2048 | 200 |

| heads | rows x new tokens (+ stored) | FlashAttention-3 | cuDNN |
|---|---|---:|---:|
| 16/8 | 32 x 512 (+ 0) | - | 338 |
"""
MODEL = """| workload | tokens in / out | seconds | output tok/s | input tok/s |
|---|---|---|---|---|
| many | 1 / 1 | 1 | 4,000 | 7 |
| long | 1 / 1 | 1 | 7 | 50 |
"""
ATTENTION = """bf16; copy 4.00 TB/s.

| heads | rows x context | us a layer | % |
|---|---|---|---|
| 16/8 | 64 x 2048 | 134.2 | 100 |

| heads | rows x new tokens (+ stored) | ms a layer | TFLOP/s |
|---|---|---|---|
| 16/8 | 32 x 512 (+ 0) | 1 | 110 |
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_gpu_script", ROOT / "benchmarks" / "draw_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("peers", PEERS), ("qwen3_0_6b", MODEL), ("attention", ATTENTION)):
        (tmp_path / f"{name}.md").write_text(text)
    return tmp_path


def test_bars_are_shares_of_what_the_hardware_allows(script: ModuleType, folder: Path) -> None:
    (axis,) = script.draw_throughput(folder).axes
    bars = {(bar.get_label(), round(bar[0].get_height(), 6)) for bar in axis.containers}
    wanted = {("llmkit", 0.4), ("vLLM", 0.3), ("llmkit", 0.5), ("vLLM", 0.1), ("nano-vllm", 0.2)}
    assert bars == wanted | {("vLLM", 0.25), ("nano-vllm", 0.5)}
    assert {"4,000", "50", "10,000"} <= {text.get_text() for text in axis.texts}


def test_points_are_bytes_over_time(script: ModuleType, folder: Path) -> None:
    decode, prefill = script.draw_attention(folder).axes
    points = [line.get_xydata()[0].tolist() for line in decode.lines if line.get_linestyle() == "None"]
    megabytes = 2 * 64 * 2048 * 8 * 128 * 2 / 1e6
    assert points == [pytest.approx([megabytes, 1.0], rel=1e-3), pytest.approx([megabytes, 0.671], rel=1e-3)]
    assert [bar.get_height() for bar in prefill.patches if bar.get_width() < 1] == [110, 338]


def test_the_committed_tables_can_be_drawn(script: ModuleType, tmp_path: Path) -> None:
    script.main(["--out", str(tmp_path)])
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("throughput.png", "attention.png"))
    measured = script.throughputs(script.FOLDER)
    assert measured and all(each["engines"]["llmkit"] for each in measured)
