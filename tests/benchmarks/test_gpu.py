"""A row of the table of GPU workloads, made on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gpu
from llmkit.workload.requests import TimedRequest
from tests.tiny_llm import tiny


def test_a_row_has_throughput_host_time_and_idle_share(make_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [TimedRequest(0.0, (1, 2, 3), 4), TimedRequest(0.0, (4, 5), 6)]
    monkeypatch.setitem(gpu.WORKLOADS, "tiny", lambda seed: requests)
    llm = make_llm(tiny())
    cells = [cell.strip() for cell in gpu.measure(llm, "tiny", 2).strip("|").split("|")]
    assert cells[:3] == ["tiny", "2", "5 / 10"] and len(cells) == 9
    assert all(float(cell.replace(",", "")) > 0 for cell in (*cells[4:6], cells[7]))
    assert cells[8] == "-", "a CPU has no queue to be idle"
    assert not [plugin for plugin in llm.plugin_manager.get_plugins() if "Recorder" in type(plugin).__name__]
