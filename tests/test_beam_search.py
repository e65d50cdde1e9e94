"""The beam search of docs/examples finds the sequences of transformers, and its beams share blocks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit import LLM, ConfigError, RequestError, SamplingParams
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import BLOCK_SIZE, Tap, prompts
from tests.tiny_llm import EOS, tiny

FILE = Path(__file__).parents[1] / "docs" / "examples" / "beam-search" / "beam_search.py"
PROMPTS = prompts((1, 7, 23))
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("beam_search", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["beam_search"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(cache: str = "paged") -> LLM:
    return LLM(tiny(), cache=cache, block_size=BLOCK_SIZE, num_blocks=64)


def theirs(prompt: list[int], num_beams: int, length_penalty: float) -> list[list[int]]:
    """New tokens of all beams of transformers, best first, up to the end token."""
    ids = torch.tensor([prompt])
    out = tiny().as_transformers().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False, num_beams=num_beams,
        num_return_sequences=num_beams, length_penalty=length_penalty, early_stopping=False, eos_token_id=EOS,
        pad_token_id=0,
    )  # fmt: skip
    beams = [row[len(prompt) :] for row in out.tolist()]
    return [beam[: beam.index(EOS) + 1] if EOS in beam else beam for beam in beams]


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "cache"),
    [(2, 0.0, "paged"), (3, 0.0, "contiguous"), (3, 1.0, "paged"), (4, 0.0, "radix"), (4, 2.0, "paged")],
)
def test_same_sequences_as_transformers(example: Any, num_beams: int, length_penalty: float, cache: str) -> None:
    num_ended, llm = 0, build(cache)
    for prompt in PROMPTS:
        with ReallyFloat64():
            wanted = theirs(prompt, num_beams, length_penalty)
            found = example.beam_search(llm, prompt, num_beams, MAX_TOKENS, length_penalty)
        assert [list(beam.token_ids) for beam in found] == wanted
        num_ended += sum(len(beam) < MAX_TOKENS for beam in wanted)
    assert num_ended > 1 or length_penalty, "no beam ends before the others"


def test_beams_compute_only_what_they_do_not_share(example: Any) -> None:
    """A round runs each beam from its last full block that is cached on; without reuse, from its first token."""
    prompt, num_rounds = PROMPTS[-1], 6
    shared, alone = build(), build("contiguous")
    numbers = []
    for llm in (shared, alone):
        tap = Tap(llm)
        found = example.beam_search(llm, prompt, 4, num_rounds, 2.0)
        numbers.append(sum(plan.num_tokens for plan in tap.plans))
        assert len(found) == 4 and not llm.engine.planner.allocator.census()
    rounds = range(1, num_rounds)
    assert numbers[1] == len(prompt) + sum(4 * (len(prompt) + grown) for grown in rounds)
    assert numbers[0] <= len(prompt) + 4 * BLOCK_SIZE * len(rounds) < numbers[1] / 4


@pytest.mark.parametrize(("prompt", "num_beams", "reason"), [([1], 11, "between 1 and 10"), ([], 2, "empty")])
def test_what_cannot_be_searched_is_refused(example: Any, prompt: list[int], num_beams: int, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        example.beam_search(build(), prompt, num_beams)


def test_its_limit_is_that_of_the_parameters(example: Any) -> None:
    SamplingParams(logprobs=example.MAX_LOGPROBS)
    with pytest.raises(ConfigError):
        SamplingParams(logprobs=example.MAX_LOGPROBS + 1)
