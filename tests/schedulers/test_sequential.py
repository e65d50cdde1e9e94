"""One at a time, to its end."""

from typing import Any

import pytest
from pydantic import ValidationError

from llmkit_schedulers.sequential import Sequential


def test_one_request_at_a_time_in_order_of_arrival(make_stage: Any) -> None:
    stage = make_stage(Sequential)
    for name in "abc":
        stage.add(name, max_tokens=3)
    assert [list(step) for step in stage.steps()] == [["a"]] * 3 + [["b"]] * 3 + [["c"]] * 3


def test_more_than_one_sequence_cannot_be_asked_for() -> None:
    assert Sequential.Settings().max_num_seqs == 1
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Sequential.Settings(max_num_seqs=2)
