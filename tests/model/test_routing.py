"""The door to the attention backend: routes belong to a thread and to a `with` block."""

from __future__ import annotations

from threading import Barrier, Thread
from typing import Any

import pytest
import torch

from llmkit import LLM, SamplingParams
from llmkit.model.routing import routed
from tests.tiny_llm import MakeLLM, tiny

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def test_engines_over_one_model_run_in_threads_of_their_own(make_llm: MakeLLM) -> None:
    """Both go through the same attention modules, step by step at the same time."""
    prompts = [[5, 6, 7], list(range(10, 40))]
    alone = [make_llm(tiny(), fused=False).generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    engines = [make_llm(tiny(), fused=False) for _ in prompts]
    barrier, got = Barrier(2), [()] * 2

    def work(number: int) -> None:
        llm: LLM = engines[number]
        stream: Any = llm.stream(prompts[number], GREEDY)
        for _ in range(GREEDY.max_tokens):
            barrier.wait(timeout=60)
            got[number] += next(stream).token_ids
        stream.close()

    threads = [Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == alone


def test_without_a_route_attention_fails() -> None:
    model = tiny()
    ids = torch.tensor([[1, 2]])
    with pytest.raises(LookupError):
        model.module(input_ids=ids, use_cache=False)
    with routed({}), pytest.raises(KeyError):
        model.module(input_ids=ids, use_cache=False)
