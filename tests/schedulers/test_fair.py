"""Service is shared evenly among tenants that want it, absence saves nothing up, and victims do not take turns."""

from typing import Any

import pytest

from llmkit_schedulers.fair import Fair


def test_tenants_take_turns_within_a_step_and_ties_go_by_arrival(make_stage: Any) -> None:
    stage = make_stage(Fair, max_num_seqs=4)
    for name in ("a1", "a2", "a3", "b1", "b2"):
        stage.add(name, max_tokens=1, tenant=name[0])
    assert [list(step) for step in stage.steps()] == [["a1", "b1", "a2", "b2"], ["a3"]]


def test_the_least_served_goes_first(make_stage: Any) -> None:
    stage = make_stage(Fair, max_num_seqs=1)
    stage.add("a1", num_prompt=4, max_tokens=1, tenant="a"), stage.add("b1", num_prompt=12, max_tokens=1, tenant="b")
    for name in ("b2", "a2", "a3", "a4"):
        stage.add(name, num_prompt=4, max_tokens=1, tenant=name[0])
    # Counted with the output token's extra: a had 5 when b ran, b 13 then; a catches up with two more requests.
    assert [next(iter(step)) for step in stage.steps()] == ["a1", "b1", "a2", "a3", "b2", "a4"]


@pytest.mark.parametrize(("weight", "order"), [(1.0, "abab"), (9.0, "abba")])
def test_output_tokens_weigh_more_than_prompt_tokens(make_stage: Any, weight: float, order: str) -> None:
    """a computes 4 tokens for 3 outputs, b computes 6 for one."""
    stage = make_stage(Fair, max_num_seqs=1, output_weight=weight)
    for name, num_prompt, max_tokens in (("a1", 2, 3), ("b1", 6, 1), ("a2", 2, 3), ("b2", 6, 1)):
        stage.add(name, num_prompt=num_prompt, max_tokens=max_tokens, tenant=name[0])
    stage.steps()
    assert "".join(name[0] for name in sorted(stage.ended, key=stage.ended.get)) == order


@pytest.mark.parametrize("depth", [0, 1])
def test_absence_saves_nothing_up(make_stage: Any, depth: int) -> None:
    """b was there early, then a is served alone for a long time; when b comes back they share again at once."""
    stage = make_stage(Fair, max_num_seqs=1, depth=depth)
    stage.add("b0", max_tokens=1, tenant="b"), stage.add("a0", max_tokens=60, tenant="a")
    for _ in range(60):
        stage.step()
    for number in range(1, 9):
        stage.add(f"a{number}", max_tokens=4, tenant="a"), stage.add(f"b{number}", max_tokens=4, tenant="b")
    stage.steps()
    last = sorted(stage.ended, key=stage.ended.get)[2:]
    turns = "".join(name[0] for name in last)
    assert "aaa" not in turns and "bbb" not in turns, turns


def test_absence_saves_nothing_up_while_nobody_waits(make_stage: Any) -> None:
    """a alone has run for a long time when both come: b begins where a is, though a has not been waiting."""
    stage = make_stage(Fair, max_num_seqs=1)
    stage.add("a0", max_tokens=30, tenant="a")
    for _ in range(29):
        stage.step()
    for number in range(1, 9):
        stage.add(f"a{number}", max_tokens=4, tenant="a"), stage.add(f"b{number}", max_tokens=4, tenant="b")
    stage.steps()
    turns = "".join(name[0] for name in sorted(stage.ended, key=stage.ended.get)[1:])
    assert "aaa" not in turns and "bbb" not in turns, turns


def test_a_tenant_that_only_runs_is_away_as_well(make_stage: Any) -> None:
    """b has one long request while a is served a lot beside it; what b did not ask for then it cannot ask for later."""
    stage = make_stage(Fair, max_num_seqs=2, num_blocks=128, cache_options={"prefix": False})
    stage.add("b0", max_tokens=90, tenant="b")
    for number in range(60):
        stage.add(f"a{number}", num_prompt=20, max_tokens=1, tenant="a")
    for _ in range(30):
        stage.step()
    for number in range(1, 9):
        stage.add(f"b{number}", num_prompt=20, max_tokens=1, tenant="b")
    taken = [name[0] for _ in range(12) for name in stage.step() if name != "b0"]
    assert "bbb" not in "".join(taken) and taken.count("b") >= 4, taken


def test_a_tenant_whose_requests_start_at_once_saves_nothing_up(make_stage: Any) -> None:
    """b brings a small one in every step, which never has to wait, then many large ones: they share at once."""
    stage = make_stage(Fair, max_num_seqs=2, cache_options={"prefix": False})
    for number in range(60):
        stage.add(f"a{number}", num_prompt=20, max_tokens=1, tenant="a")
    for number in range(15):
        stage.add(f"b{number}", num_prompt=1, max_tokens=1, tenant="b")
        assert len(stage.step()) == 2
    for number in range(15, 25):
        stage.add(f"b{number}", num_prompt=20, max_tokens=1, tenant="b")
    assert all({name[0] for name in stage.step()} == {"a", "b"} for _ in range(8))


def test_leaving_clears_no_debt(make_stage: Any) -> None:
    """a got much beside b, leaves and is back after c has come and gone, but b still goes first."""
    stage = make_stage(Fair, max_num_seqs=2, num_blocks=128)
    stage.add("b0", max_tokens=90, tenant="b"), stage.add("a0", num_prompt=200, max_tokens=1, tenant="a")
    stage.step(), stage.step()
    assert "a0" in stage.ended
    stage.add("c0", max_tokens=1, tenant="c"), stage.step(), stage.step()
    for name in ("a1", "b1", "a2", "b2"):
        stage.add(name, max_tokens=1, tenant=name[0])
    stage.steps()
    assert sorted((name for name in stage.ended if name != "b0"), key=stage.ended.get)[2:] == ["b1", "b2", "a1", "a2"]


def test_tenants_that_stay_share_evenly_all_the_time(make_stage: Any) -> None:
    """Requests of very different sizes, always some of each waiting: counters differ by what is running at most."""
    stage = make_stage(Fair, max_num_seqs=4, num_blocks=128)
    for number in range(40):
        stage.add(f"a{number}", num_prompt=20, max_tokens=10, tenant="a")
    for number in range(200):
        stage.add(f"b{number}", num_prompt=2, max_tokens=3, tenant="b")
    planner, fair = stage.engine.planner, stage.engine.planner.scheduler
    largest = 4 * (20 + 2 * 10)
    for _ in range(100):
        stage.step()
        assert {view.tenant for view in planner._waiting} == {"a", "b"}
        assert abs(fair._counters["a"] - fair._counters["b"]) <= largest
    assert min(fair._counters.values()) > 3 * largest


def test_victims_do_not_take_turns(make_stage: Any) -> None:
    """Two that do not fit together: the latest admitted gives way, once, though its tenant then had less."""
    stage = make_stage(Fair, num_blocks=8)
    stage.add("a", num_prompt=8, max_tokens=20, tenant="a"), stage.add("b", num_prompt=8, max_tokens=20, tenant="b")
    stage.steps()
    assert stage.num_preemptions["a"] == 0 and stage.num_preemptions["b"] <= 2
    assert stage.ended["a"] < stage.ended["b"]


def test_a_preempted_request_is_charged_for_what_it_runs_again(make_stage: Any) -> None:
    stage = make_stage(Fair, num_blocks=8, output_weight=1.0)
    stage.add("a", num_prompt=8, max_tokens=20, tenant="a"), stage.add("b", num_prompt=8, max_tokens=20, tenant="b")
    stage.steps()
    stage.add("c", max_tokens=1, tenant="b"), stage.step()
    # Alone it computes 8 tokens of its prompt and 19 of its output: the last one is never run.
    num_again = stage.num_recomputed["b"]
    assert num_again > 0 and stage.engine.planner.scheduler._counters["b"] == 27 + num_again


def test_tenants_that_owe_nothing_are_forgotten(make_stage: Any) -> None:
    stage = make_stage(Fair, max_num_seqs=4)
    stage.add("stays", num_prompt=2, max_tokens=200, tenant="stays")
    for number in range(80):
        stage.add(f"r{number}", max_tokens=1, tenant=f"t{number}")
        stage.step()
    stage.steps()
    assert len(stage.ended) == 81 and len(stage.engine.planner.scheduler._counters) < 10
