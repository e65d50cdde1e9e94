"""The table of host times has a line for every number of rows, and its parts add up."""

from __future__ import annotations

import pytest

from benchmarks.host_time import main


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rows", "1", "8", "--steps", "30"])
    lines = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    assert [line[0].strip() for line in lines] == ["rows", "---:", "1", "8"]
    for line in lines[2:]:
        whole, plan, launch, land, streamed, ending = map(float, line[1:])
        assert min(plan, launch, land, streamed, ending) > 0
        assert plan + launch + land == pytest.approx(whole, rel=0.5)
