"""Aborting, preempting and finishing at every step of a run: neighbours do not notice, and no block stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmkit import LLM, Registry, Request, RequestQueue, SchedulingStep, hookimpl
from llmkit.engine.swapping import SwapCosts
from tests.equality.real_shapes import greedy, loaded, prompts, unexplained
from tests.equality.runs import installed
from tests.tiny_llm import check_nothing_left, tiny

CONTINUOUS: Any = installed().get("scheduler", "continuous").load()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DEPTHS = [0, 1]
NUM_STEPS = 14
"""As many as an undisturbed run has, and more."""
MAX_STEPS = 2 * NUM_STEPS


class Preempting(CONTINUOUS):  # type: ignore[misc]
    """Preempts everybody who runs in the step for which it is told to."""

    is_told = False

    def repeats(self, num_waiting: int, num_free_seqs: int) -> bool:
        return not self.is_told and super().repeats(num_waiting, num_free_seqs)

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        super().schedule(queue, step)
        if self.is_told:
            for request in list(queue.running):
                step.preempt(request)
            self.is_told = False


class Plugin:
    @hookimpl(trylast=True)
    def llmkit_register(self, registry: Registry) -> None:
        registry.add_scheduler("preempting", Preempting)


def build(device: str, depth: int, swaps: bool = False) -> LLM:
    """On a CPU tiny and exact, on a GPU with graphs and real head dimensions.

    With `swaps` preempted requests always wait in host memory, and nothing is found in the cache.
    """
    model = tiny() if device == "cpu" else loaded("qwen3", device)
    scheduler = {"name": "preempting", "max_num_seqs": 3, "max_chunk_tokens": 30, "max_num_batched_tokens": 64}
    options: dict[str, Any] = {"depth": depth, "block_size": 16, "num_blocks": 40, "plugins": [Plugin()]}
    if swaps:
        options |= {"cache": {"name": "paged", "prefix": False}, "swap_gib": 0.1}
    llm = LLM(model, scheduler, attention="sdpa" if device == "cpu" else "flash", **options)
    if swaps:
        assert llm.engine.planner.host is not None
        llm.engine.planner.host.costs = SwapCosts(1.0, 0.0, 0.0)
    return llm


def run(llm: LLM, disturb: Callable[[int, list[Request]], None], max_steps: int = MAX_STEPS) -> list[Request]:
    """Four requests for three places, done with; `disturb(step, requests)` comes before every step."""
    lengths, limits = (1, 47, 20, 33), (9, 3, 6, 4)
    requests = [
        Request(str(number), [token % 90 + 3 for token in prompt[:length]], greedy(limit))
        for number, (prompt, length, limit) in enumerate(zip(prompts(10)[4::5] * 2, lengths, limits, strict=True))
    ]
    for request in requests:
        llm.engine.add(request)
    step = 0
    while llm.engine.has_unfinished:
        disturb(step, requests)
        llm.engine.step()
        llm.engine.planner.allocator.check()
        step += 1
    assert step <= max_steps
    check_nothing_left(llm)
    return requests


def assert_alike(device: str, wanted: list[Request], got: list[Request]) -> None:
    for one, other in zip(wanted, got, strict=True):
        assert other.error is None
        if device == "cpu":
            assert other.output_token_ids == one.output_token_ids
        else:
            prompt = one.token_ids[: one.num_prompt_tokens]
            assert not unexplained("qwen3", device, prompt, one.output_token_ids, other.output_token_ids)


@pytest.mark.parametrize("swaps", [False, True], ids=["recomputing", "swapping"])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("device", DEVICES)
def test_preempting_everybody_at_every_step(device: str, depth: int, swaps: bool) -> None:
    llm = build(device, depth, swaps)
    scheduler: Any = llm.engine.planner.scheduler
    wanted = run(llm, lambda step, requests: None, NUM_STEPS)
    num_preemptions = num_recomputed = 0
    for at in range(NUM_STEPS):

        def tell(step: int, requests: list[Request], at: int = at) -> None:
            scheduler.is_told = scheduler.is_told or step == at

        got = run(llm, tell)
        assert_alike(device, wanted, got)
        num_preemptions += sum(request.num_preemptions for request in got)
        num_recomputed += sum(request.num_recomputed_tokens for request in got)
    assert num_preemptions > NUM_STEPS
    assert bool(num_recomputed) == (not swaps or depth > 0), "swapping loses what is in flight, and nothing else"


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("device", DEVICES)
def test_aborting_each_at_every_step(device: str, depth: int) -> None:
    llm = build(device, depth)
    wanted = run(llm, lambda step, requests: None, NUM_STEPS)
    lengths = set()
    for at in range(NUM_STEPS):
        for gone in range(len(wanted)):

            def abort(step: int, requests: list[Request], at: int = at, gone: int = gone) -> None:
                if step == at:
                    llm.engine.abort([requests[gone].request_id])

            got = run(llm, abort)
            lengths.add((gone, got[gone].num_output_tokens))
            ended = wanted[gone].output_token_ids[: got[gone].num_output_tokens]
            assert device != "cpu" or got[gone].output_token_ids == ended
            others = [index for index in range(len(wanted)) if index != gone]
            assert_alike(device, [wanted[index] for index in others], [got[index] for index in others])
    assert len(lengths) > NUM_STEPS


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("device", DEVICES)
def test_one_finishes_at_every_step(device: str, depth: int) -> None:
    llm = build(device, depth)
    params = [greedy(number + 1) for number in range(NUM_STEPS)]
    outputs = llm.generate([[3 + number, 5] for number in range(NUM_STEPS)], params)
    assert [len(output.token_ids) for output in outputs] == list(range(1, NUM_STEPS + 1))
    check_nothing_left(llm)
