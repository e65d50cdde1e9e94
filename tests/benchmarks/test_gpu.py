"""A row of the table of GPU workloads, made on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.floor import Device, Work, floor_seconds, work_of
from llmkit.model.spec import ModelSpec
from llmkit.workload.requests import TimedRequest
from tests.tiny_llm import IDS, tiny


def test_a_row_has_throughput_host_time_and_idle_share(make_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [TimedRequest(0.0, (1, 2, 3), 4), TimedRequest(0.0, (4, 5), 6)]
    monkeypatch.setitem(gpu.WORKLOADS, "tiny", lambda seed: requests)
    llm = make_llm(tiny())
    cells = [cell.strip() for cell in gpu.measure(llm, "tiny", 2, Device(1e15, 1e15)).strip("|").split("|")]
    assert cells[:3] == ["tiny", "2", "5 / 10"] and len(cells) == 11
    assert all(float(cell.replace(",", "")) > 0 for cell in (*cells[4:6], cells[7]))
    assert cells[8] == "-", "a CPU has no queue to be idle"
    assert not [plugin for plugin in llm.plugin_manager.get_plugins() if "Recorder" in type(plugin).__name__]
    assert cells[9:] == ["0.00", "0%"]
    assert gpu.measure(llm, "tiny", 1).endswith("| - | - |")


def test_the_floor_is_what_reading_and_multiplying_take() -> None:
    work = Work(weights=100, weight_bytes=200, kv_bytes=10, pair_flops=6)
    prompts = (2 * 100 * (3 + 2) + 6 * (6 + 3)) / 1000
    contexts = [(4, 3), (5,)]
    reads = sum(200 / 50 + sum(each) * 10 / 50 for each in contexts)
    assert floor_seconds([(3, 3), (2, 2)], work, Device(50, 1000)) == pytest.approx(prompts + reads)
    products = sum(2 * 100 * len(each) / 10 for each in contexts)
    slow = floor_seconds([(3, 3), (2, 2)], work, Device(1e9, 10))
    assert slow == pytest.approx(100 * prompts + products, rel=1e-6), "products take longer than the weights"


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_is_read_whole_but_for_an_embedding_that_is_no_head(make_llm: Any, is_tied: bool) -> None:
    llm = make_llm(ModelSpec("tiny", config={**IDS.config, "tie_word_embeddings": is_tied}))
    module, work = llm.model.module, work_of(llm)
    embedding = module.get_input_embeddings().weight
    numbers = sum({id(p): p.numel() for p in module.parameters()}.values())
    assert work.weights == numbers - (0 if is_tied else embedding.numel())
    assert work.weight_bytes == work.weights * embedding.itemsize
    layer = next(iter(llm.model.architecture.layers.values()))
    num_layers = len(llm.model.architecture.layers)
    assert work.kv_bytes == num_layers * 2 * layer.num_kv_heads * layer.head_dim * embedding.itemsize
    assert work.pair_flops == num_layers * 4 * layer.num_heads * layer.head_dim
