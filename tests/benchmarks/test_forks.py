"""The benchmark of forks: its counts are what one can work out by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.forks import main


@pytest.mark.parametrize("layers", [[], ["--window", "16"]])
def test_it_counts_what_is_computed_and_held(layers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt-len", "20", "--samples", "3", "--block-size", "16", "--rounds", "1", *layers]) == 0
    first, *arms, where = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["rounds"] == 2 and where["num_cpus"]
    found = {(arm["forks"], arm["cache.prefix"]): (arm["prompt_tokens_computed"], arm["most_blocks"]) for arm in arms}
    tail = 20 - 16
    assert found == {
        (False, False): (3 * 20, 3 * 3),
        (False, True): (20 + 2 * tail, 3 * 3 - 2),
        (True, False): (20 + 2, 3 * 3 - 2),
        (True, True): (20 + 2, 3 * 3 - 2),
    }
