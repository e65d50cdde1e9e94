"""The benchmark of prefix caching, small: both arms run, only one of them reuses, and the JSON says so."""

import json

import pytest

from benchmarks.prefix_caching import Shape, main, prompts_of


def test_requests_share_their_beginning_only() -> None:
    first, second = prompts_of(0, Shape(2, 30), 50)
    assert first[:30] == second[:30] and first[30:] != second[30:]
    assert prompts_of(1, Shape(1, 30), 50)[0][:30] != first[:30]


def test_it_prints_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num-requests", "4", "--prompt-len", "700", "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_requests"], result["prompt_len"], result["rounds"]) == (4, 700, 1)
    assert result["ttft_ratio"] == result["mean_ttft_off_s"] / result["mean_ttft_on_s"]
    assert 0.2 < result["hit_rate"] < 0.75 and len(result["ttft_ratios"]) == 1


@pytest.mark.parametrize("option", ["--num-requests", "--prompt-len", "--rounds"])
def test_counts_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([option, "0"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {option} must be at least 1\n")
