"""A scheduler that runs nothing is asked again for a while, and then given up."""

from __future__ import annotations

import pytest

from llmkit import LlmkitError, Registry, RequestView, SamplingParams, SchedulingStep, VirtualClock, hookimpl
from llmkit_schedulers.continuous import Continuous
from tests.tiny_llm import MakeLLM

PROMPTS = [[5, 6, 7], [50]]


class Late(Continuous):
    """Admits nobody before its time."""

    opens = 4.0

    def admit(self, request: RequestView, step: SchedulingStep) -> bool:
        return step.now >= self.opens


class Never(Late):
    """Admits nobody."""

    opens = float("inf")


class Lazybones:
    @hookimpl
    def llmkit_register(self, registry: Registry) -> None:
        registry.add_scheduler("late", Late)
        registry.add_scheduler("never", Never)


@pytest.mark.parametrize("depth", [0, 1])
def test_generate_gives_up_and_can_be_called_again(make_llm: MakeLLM, depth: int) -> None:
    llm = make_llm(scheduler="never", plugins=[Lazybones()], clock=VirtualClock(), depth=depth)
    for _ in range(2):
        start = llm.engine.clock.now()
        with pytest.raises(LlmkitError, match="scheduler Never has run nothing for 10 s; waiting: 2"):
            llm.generate(PROMPTS)
        assert llm.engine.clock.now() - start == pytest.approx(10.0, abs=0.01)


@pytest.mark.parametrize("depth", [0, 1])
def test_generate_waits_for_who_waits_for_time(make_llm: MakeLLM, depth: int) -> None:
    llm = make_llm(scheduler="late", plugins=[Lazybones()], clock=VirtualClock(), depth=depth)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [3, 3]
    assert llm.engine.clock.now() == pytest.approx(4.0, abs=0.01)
