"""First come, first served; everybody joins at once; the latest gives way."""

from typing import Any

from llmkit_caches.contiguous import ContiguousCache
from llmkit_schedulers.continuous import Continuous


def test_everybody_starts_in_order_of_arrival_as_far_as_the_budget_goes(make_stage: Any) -> None:
    stage = make_stage(Continuous, max_num_batched_tokens=10)
    for name in "abc":
        stage.add(name, num_prompt=4)
    assert [list(step.items()) for step in (stage.step(), stage.step())] == [
        [("a", 4), ("b", 4), ("c", 2)],
        [("a", 1), ("b", 1), ("c", 2)],
    ]


def test_a_newcomer_joins_the_moment_another_ends(make_stage: Any) -> None:
    stage = make_stage(Continuous, max_num_seqs=2)
    stage.add("a", max_tokens=2), stage.add("b", max_tokens=5), stage.add("c", max_tokens=2)
    assert [list(step) for step in stage.steps()] == [["a", "b"], ["a", "b"], ["b", "c"], ["b", "c"], ["b"]]


def test_planning_ahead_an_unforeseen_end_costs_one_step_and_holds_up_nobody(make_stage: Any) -> None:
    """Blocks on their way back keep out nobody who does not need them, even if some come back in every step."""
    stage = make_stage(Continuous, max_num_seqs=3, depth=1)
    for name, num_tokens in [("a", 2), ("b", 3), ("e", 8), ("c", 3), ("d", 3)]:
        stage.add_unforeseen(name, num_tokens)
    taken = ["".join(step) for step in stage.steps()]
    assert taken[:8] == ["abe", "abe", "abe", "be", "ec", "ecd", "ecd", "ecd"]


def test_long_prompts_run_in_chunks_beside_decodes(make_stage: Any) -> None:
    stage = make_stage(Continuous, max_chunk_tokens=3)
    stage.add("a", num_prompt=2, max_tokens=9)
    stage.step()
    stage.add("b", num_prompt=8)
    assert [stage.step() for _ in range(4)] == [{"a": 1, "b": 3}, {"a": 1, "b": 3}, {"a": 1, "b": 2}, {"a": 1, "b": 1}]


def test_the_latest_gives_way_when_blocks_run_out(make_stage: Any) -> None:
    stage = make_stage(Continuous, num_blocks=4)
    stage.add("a", num_prompt=6, max_tokens=8), stage.add("b", num_prompt=6, max_tokens=8)
    stage.steps()
    assert stage.num_preemptions == {"a": 0, "b": 1}
    assert stage.ended["a"] < stage.ended["b"]


def test_a_reservation_for_the_full_length_never_preempts(make_stage: Any) -> None:
    stage = make_stage(Continuous, num_blocks=4, cache=ContiguousCache)
    stage.add("a", num_prompt=6, max_tokens=8), stage.add("b", num_prompt=6, max_tokens=8)
    assert all(len(step) == 1 for step in stage.steps())
    assert stage.num_preemptions == {"a": 0, "b": 0}


def test_nobody_overtakes_the_one_that_does_not_fit_yet(make_stage: Any) -> None:
    stage = make_stage(Continuous, num_blocks=4)
    stage.add("a", num_prompt=8, max_tokens=4)
    stage.step()
    stage.add("large", num_prompt=12, max_tokens=1), stage.add("small", num_prompt=1, max_tokens=1)
    stage.steps()
    assert stage.ended["a"] < stage.ended["large"] and stage.ended["large"] <= stage.ended["small"]
