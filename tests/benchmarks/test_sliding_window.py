"""The benchmark of sliding windows, small: what is released lets more requests run at once, with the same tokens."""

import json

import pytest

from benchmarks.sliding_window import main


def test_released_blocks_serve_others(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--window", "16", "--num-blocks", "12", "--num-requests", "6", "--prompt-len", "20", "--output-len", "60"]
    assert main(sizes) == 0
    holding, releasing, outputs = map(json.loads, capsys.readouterr().out.splitlines())
    assert (holding["cache"], releasing["cache"], outputs) == ("holding", "releasing", {"equal_outputs": True})
    assert releasing["mean_running"] > 1.5 * holding["mean_running"] and releasing["steps"] < holding["steps"]
    assert max(holding["most_used_blocks"], releasing["most_used_blocks"]) <= 12 == releasing["blocks"]


def test_full_layers_get_what_windowed_ones_release(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--window", "16", "--num-blocks", "24", "--num-requests", "6", "--prompt-len", "20", "--output-len", "60"]
    assert main([*sizes, "--num-layers", "4", "--num-full", "1", "--budget", "16", "--no-prefix"]) == 0
    holding, releasing, outputs = map(json.loads, capsys.readouterr().out.splitlines())
    assert outputs == {"equal_outputs": True} and (holding["blocks"], releasing["blocks"]) == (24, [30, 19])
    assert releasing["mean_running"] > holding["mean_running"] and releasing["steps"] < holding["steps"]
    assert releasing["most_used_blocks"][0] == 30 and releasing["most_used_blocks"][1] <= 19
