"""The benchmark of sliding windows, small: what is released lets more requests run at once, with the same tokens."""

import json

import pytest

from benchmarks.sliding_window import main


def test_released_blocks_serve_others(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--window", "16", "--num-blocks", "12", "--num-requests", "6", "--prompt-len", "20", "--output-len", "60"]
    assert main(sizes) == 0
    holding, paged, outputs = map(json.loads, capsys.readouterr().out.splitlines())
    assert (holding["cache"], paged["cache"], outputs) == ("holding", "paged", {"equal_outputs": True})
    assert paged["mean_running"] > 1.5 * holding["mean_running"] and paged["steps"] < holding["steps"]
    assert max(holding["most_used_blocks"], paged["most_used_blocks"]) <= 12
