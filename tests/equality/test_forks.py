"""Samples that are forked from one prompt: logits of `transformers`, and the tokens they would get alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmkit.engine.executor import TorchExecutor
from llmkit.llm import LLM, sample_seed
from llmkit.types import SamplingParams, StepPlan
from llmkit_attention import blocks
from tests.equality import real_shapes
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import BLOCK_SIZE, GREEDY, MAX_TOKENS, ROOMY, SCARCE, Tap, prompts, reference
from tests.equality.zoo import tiny_model
from tests.testing.test_mutants import Bug, plant
from tests.tiny_llm import check_nothing_left

NUM_SAMPLES = 4
LENGTHS = (BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 4 * BLOCK_SIZE + 3, 3)
"""Nothing to copy behind a full block; a block but for one; some of a block; too short to wait."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
OFF = {"name": "paged", "prefix": False}


def build(cache: Any, device: str = "cpu", name: str = "llama", num_blocks: int = ROOMY, **options: Any) -> LLM:
    options |= {"attention": "sdpa", "block_size": BLOCK_SIZE, "num_blocks": num_blocks, "fused": False}
    return LLM(tiny_model(name, device), cache=cache, **options)


@functools.cache
def apart(name: str, device: str) -> LLM:
    """An engine in which nothing is shared, for one request at a time."""
    return build("contiguous", device, name)


def num_copied(tap: Tap) -> int:
    """Blocks copied for forks, the same number in every group of layers."""
    copies = [plan.copies for plan in tap.plans if plan.copies is not None]
    assert all(len(more) == len(one.forks) for one in copies for more in one.more_forks)
    return sum(len(one.forks) for one in copies)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("cache", "name", "depth", "num_blocks"),
    [
        ("paged", "llama", 0, ROOMY),
        ("paged", "llama", 1, SCARCE),
        (OFF, "llama", 1, ROOMY),
        (OFF, "gemma2", 0, SCARCE),
        ("radix", "gemma2", 1, ROOMY),
        (OFF, "gemma3_text", 1, ROOMY),
        ("paged", "cohere2", 0, ROOMY),
        ("radix", "llama", 0, SCARCE),
        ("paged", "mistral", 1, SCARCE),
        ("contiguous", "llama", 1, ROOMY),
    ],
)
def test_greedy_samples_are_those_of_transformers(
    cache: Any, name: str, depth: int, num_blocks: int, device: str
) -> None:
    llm = build(cache, device, name, num_blocks, depth=depth)
    tap, plain = Tap(llm), tiny_model(name, device).as_transformers()
    with ReallyFloat64():
        outputs = llm.generate(prompts(LENGTHS), GREEDY.model_copy(update={"n": NUM_SAMPLES}))
        for number, output in enumerate(outputs):
            prompt = list(output.prompt_token_ids)
            wanted = reference(plain, prompt)
            for index, sample in enumerate(output.completions):
                assert list(sample.token_ids) == wanted.token_ids
                logits = [tap.logits[f"{number}-{index}", len(prompt) + at] for at in range(MAX_TOKENS)]
                assert (torch.stack(logits) - wanted.logits).abs().max() < 1e-9
    llm.engine.planner.allocator.check()
    assert (num_copied(tap) > 2) == (cache != "contiguous")
    assert num_blocks == ROOMY or sum(one.metrics.num_preemptions for out in outputs for one in out.completions) > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("cache", "name", "depth"),
    [
        ("paged", "llama", 1),
        (OFF, "llama", 0),
        (OFF, "llama", 1),
        ("radix", "llama", 0),
        (OFF, "gemma2", 0),
        ("radix", "gemma2", 1),
        ("paged", "gemma3_text", 1),
    ],
)
def test_drawn_samples_are_those_each_would_get_alone(cache: Any, name: str, depth: int, device: str) -> None:
    params = SamplingParams(n=NUM_SAMPLES, max_tokens=MAX_TOKENS, temperature=1.0, seed=5, ignore_eos=True)
    forked = build(cache, device, name, depth=depth)
    tap, plain = Tap(forked), tiny_model(name, device).as_transformers()
    with ReallyFloat64():
        got = forked.generate(prompts(LENGTHS), params)
        for number, other in enumerate(got):
            for index, mine in enumerate(other.completions):
                one = params.model_copy(update={"n": 1, "seed": sample_seed(0, number, 5, index)})
                (alone,) = apart(name, device).generate([list(other.prompt_token_ids)], one)
                assert mine.token_ids == alone.token_ids
                ids = torch.tensor([[*other.prompt_token_ids, *mine.token_ids[:-1]]], device=device)
                with torch.inference_mode():
                    all_logits = plain(ids).logits[0, len(other.prompt_token_ids) - 1 :]
                first = len(other.prompt_token_ids)
                logits = [tap.logits[f"{number}-{index}", first + at] for at in range(MAX_TOKENS)]
                assert (torch.stack(logits) - all_logits).abs().max() < 1e-9
            assert len({sample.token_ids for sample in other.completions}) == NUM_SAMPLES
    assert num_copied(tap) >= 2 * (NUM_SAMPLES - 1)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("cache", ["paged", OFF, "radix"])
def test_a_fork_computes_one_token_of_its_prompt(cache: Any, name: str) -> None:
    llm = build(cache, name=name)
    tap = Tap(llm)
    params = SamplingParams(n=NUM_SAMPLES, max_tokens=2, temperature=1.0, seed=5, ignore_eos=True)
    llm.generate(prompts(LENGTHS[:3]), params)
    assert sum(plan.num_tokens for plan in tap.plans) == sum(
        length + (NUM_SAMPLES - 1) + NUM_SAMPLES for length in LENGTHS[:3]
    )


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
@pytest.mark.parametrize(
    ("device", "attention"),
    [
        pytest.param("cpu", "sdpa", marks=pytest.mark.slow),
        pytest.param("cuda", "flash", marks=pytest.mark.cuda),
    ],
)
def test_forks_in_groups_are_what_runs_apart(device: str, attention: str, name: str, depth: int) -> None:
    """Layers with a window of 48 keys and without, in bfloat16; on a GPU forks join in graphs behind their copies."""
    params, outputs, copies = real_shapes.greedy(40).model_copy(update={"n": 3}), [], []
    for cache, steps, graphs in (("contiguous", 0, False), (OFF, depth, True)):
        scheduler = {"name": "continuous", "max_num_batched_tokens": 512, "max_num_seqs": 16}
        options = {"block_size": 16, "num_blocks": 200, "attention": attention, "depth": steps, "graphs": graphs}
        llm = LLM(real_shapes.loaded(name, device), scheduler, cache, **options)  # type: ignore[arg-type]
        tap = Tap(llm)
        outputs.append(llm.generate(real_shapes.prompts(), params))
        copies = [plan.copies for plan in tap.plans if plan.copies is not None]
        check_nothing_left(llm)
    # Two forks each of prompts of 47, 64 and 150 tokens; 49 leave nothing to copy, and 1 nothing to share.
    assert [len(forks) for one in copies for forks in (one.forks, *one.more_forks)] == [6, 6]
    for prompt, *samples in zip(real_shapes.prompts(), *outputs, strict=True):
        for one, other in zip(*(sample.completions for sample in samples), strict=True):
            assert one.error is None and other.error is None
            assert not real_shapes.unexplained(name, device, prompt, one.token_ids, other.token_ids)


def late(self: TorchExecutor, plan: StepPlan) -> Any:
    """Copies behind the rows instead of before them."""
    launched = enqueue(self, replace(plan, copies=None))
    if plan.copies is not None:
        self._copy(plan.copies)
    return launched


enqueue = TorchExecutor._enqueue
BUGS: dict[str, Bug | Callable[..., Any]] = {
    "copies come after the rows": late,
    "nothing is copied": (TorchExecutor._copy, "if forks:", "if False:"),
    "another block is copied": (blocks.copy_blocks, "index_select(1, sources)", "index_select(1, sources - 1)"),
    "one token is not copied": (blocks.copy_blocks, ">= num_tokens[:, None]", ">= num_tokens[:, None] - 1"),
    "keys only are copied": (blocks.copy_blocks, "pool.index_copy_(1, blocks, copied)", "pool[0, blocks] = copied[0]"),
    "one layer is left out": (blocks.copy_blocks, "for pool in pools:", "for pool in pools[1:]:"),
}


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_copies_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = BUGS[bug]
    if callable(planted):
        monkeypatch.setattr(TorchExecutor, "_enqueue", planted)
    else:
        plant(monkeypatch, planted)
    with pytest.raises(AssertionError):
        test_greedy_samples_are_those_of_transformers(OFF, "llama", 1, ROOMY, "cpu")


OF_GROUPS: dict[str, Bug] = {
    "the first group's blocks alone are copied": (
        TorchExecutor._copy, "(copies.forks, *copies.more_forks)", "(copies.forks,)"),
    "every group copies the first one's blocks": (
        TorchExecutor._copy, "(copies.forks, *copies.more_forks)", "[copies.forks] * 2"),
    "groups copy each other's blocks": (
        TorchExecutor._copy, "(copies.forks, *copies.more_forks)", "(*copies.more_forks, copies.forks)"),
    "all copies are made in the first group's pool": (
        TorchExecutor._copy, "backend.copy_blocks(forks)", "self._backends[0].copy_blocks(forks)"),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", OF_GROUPS)
def test_bugs_of_copies_in_groups_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, OF_GROUPS[bug])
    with pytest.raises(AssertionError):
        test_greedy_samples_are_those_of_transformers(OFF, "gemma2", 1, ROOMY, "cpu")
