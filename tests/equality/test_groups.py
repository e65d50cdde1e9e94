"""Models with full and windowed layers: a block table for each group of layers, with transformers' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch

from llmkit.engine.executor import TorchExecutor
from llmkit.engine.grouped_attention import GroupedAttention, GroupedBatch
from llmkit.engine.grouped_cache import GroupedCache, groups_of
from llmkit.engine.pools import build_allocator
from llmkit.engine.residency import Residency
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.llm import LLM
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec
from llmkit.types import SamplingParams
from llmkit_caches.sharing import SharingCache
from tests.engine.test_trial import metered
from tests.equality import real_shapes
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import BLOCK_SIZE, Reference, Tap, error_of, prompts, reference, scheduler_options
from tests.equality.zoo import SHAPE, WINDOW, noised, tiny_model
from tests.testing.test_mutants import Bug, plant
from tests.tiny_llm import check_nothing_left

LENGTHS, MAX_TOKENS, CHUNK, BUDGET = (3, 31, WINDOW), 40, 6, 8
PARAMS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SCARCE, ROOMY = 15, 40
"""The longest of the prompts comes to 71 tokens, and all three to 162; a block has five."""
CACHES: dict[str, dict[str, Any]] = {
    "paged": {"name": "paged"},
    "paged without prefix": {"name": "paged", "prefix": False},
    "radix": {"name": "radix"},
}
QWEN2 = {**SHAPE, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}


@cache
def model_of(name: str) -> LoadedModel:
    """A tiny one in float64; qwen2 with two full layers in front of a windowed one."""
    if name != "qwen2":
        return tiny_model(name)
    return noised(load_model(ModelSpec(name, config=QWEN2), torch.float64, torch.device("cpu")))


@cache
def wanted(name: str) -> list[Reference]:
    plain = model_of(name).as_transformers()
    with ReallyFloat64():
        return [reference(plain, prompt, MAX_TOKENS) for prompt in prompts(LENGTHS)]


class Peaks:
    """The most blocks that a request, and all together, have held in each group.

    With `spoils` blocks of a group that nobody holds there are full of NaN: whoever reads one, even masked, gets NaN.
    """

    def __init__(self, llm: LLM, spoils: bool) -> None:
        planner, executor = llm.engine.planner, cast(Any, llm.engine.executor)
        self.groups = groups_of(planner.allocator)
        self.of_one, self.of_all = [0] * len(self.groups), [0] * len(self.groups)
        launch = executor.launch

        def watching(plan: Any) -> Any:
            planner.settle()
            for number, (group, backend) in enumerate(zip(self.groups, executor.backend.backends, strict=True)):
                if spoils:
                    for pool in backend._pools:
                        pool[:, sorted(set(range(group.spec.num_blocks)) - group.census().keys())] = float("nan")
                self.of_all[number] = max(self.of_all[number], group.stats().num_used_blocks)
                for view in planner._running:
                    num_held = len(group.block_table(view._request)) - group.num_released_blocks(view._request)
                    self.of_one[number] = max(self.of_one[number], num_held)
            return launch(plan)

        executor.launch = watching


def build(name: str, cache: str = "paged", depth: int = 0, num_blocks: int = SCARCE, **options: Any) -> LLM:
    scheduler = scheduler_options("continuous", CHUNK, BUDGET) | {"max_num_seqs": 3}
    parts: dict[str, Any] = {"scheduler": scheduler, "cache": CACHES[cache], "depth": depth, **options}
    return LLM(model_of(name), block_size=BLOCK_SIZE, num_blocks=num_blocks, fused=False, **parts)


@pytest.mark.parametrize(
    ("name", "cache", "depth", "num_blocks"),
    [
        ("gemma2", "paged", 0, SCARCE),
        ("gemma2", "paged", 1, ROOMY),
        ("gemma2", "paged without prefix", 1, SCARCE),
        ("gemma2", "radix", 1, SCARCE),
        ("gemma3_text", "paged", 1, SCARCE),
        ("gemma3_text", "paged without prefix", 0, SCARCE),
        ("gemma3_text", "radix", 0, ROOMY),
        ("qwen2", "paged without prefix", 1, SCARCE),
        ("qwen2", "radix", 0, SCARCE),
    ],
)
def test_windowed_layers_release_and_full_ones_keep(name: str, cache: str, depth: int, num_blocks: int) -> None:
    groups = check_run(name, cache, depth, num_blocks)
    assert [group.spec.window for group in groups] == [None, WINDOW]


def check_run(name: str, cache: str, depth: int, num_blocks: int) -> Sequence[CacheAllocator]:
    llm = build(name, cache, depth, num_blocks)
    tap, peaks = Tap(llm), Peaks(llm, spoils=cache == "paged without prefix")
    with ReallyFloat64():
        outputs = llm.generate(prompts(LENGTHS), PARAMS)
    assert error_of(tap, outputs, wanted(name)) < 1e-9
    assert peaks.of_one[0] == -(-(max(LENGTHS) + MAX_TOKENS - 1) // BLOCK_SIZE), "the full layers' whole length"
    # The next token sees a window; ahead of it are a chunk and what is in flight.
    assert 0 < peaks.of_one[1] <= -(-(WINDOW + CHUNK * (1 + depth)) // BLOCK_SIZE) + 1
    assert any(output.metrics.num_preemptions for output in outputs) == (num_blocks == SCARCE)
    check_nothing_left(llm)
    assert all(not group.stats().num_used_blocks for group in peaks.groups)
    return peaks.groups


def test_two_windows_make_two_groups_and_requests_longer_than_any_pool() -> None:
    """Layers of 16 keys and of 8: neither keeps everything. Transformers knows no such model, so one with a pool that
    holds everything says what is right."""
    layers = dict(model_of("gemma2").architecture.layers)
    names = list(layers)
    layers[names[1]] = replace(layers[names[1]], window=16)
    model = replace(model_of("gemma2"), architecture=replace(model_of("gemma2").architecture, layers=layers))
    results = []
    for name, num_blocks in (("contiguous", 60), ("paged", 9)):
        scheduler = scheduler_options("continuous", CHUNK, BUDGET) | {"max_num_seqs": 3}
        llm = LLM(model, scheduler, name, block_size=BLOCK_SIZE, num_blocks=num_blocks, fused=False)
        tap = Tap(llm)
        with ReallyFloat64():
            outputs = llm.generate(prompts(LENGTHS), PARAMS)
        assert [output.error for output in outputs] == [None] * 3
        results.append((outputs, [tap.of(at, prompt, MAX_TOKENS) for at, prompt in enumerate(prompts(LENGTHS))]))
        check_nothing_left(llm)
    specs = [group.spec for group in groups_of(llm.engine.planner.allocator)]
    assert specs == [CacheSpec(9, BLOCK_SIZE, 16), CacheSpec(9, BLOCK_SIZE, WINDOW)]
    assert max(LENGTHS) + MAX_TOKENS > 9 * BLOCK_SIZE
    for one, other in zip(*(logits for _, logits in results), strict=True):
        assert float((one - other).abs().max()) < 1e-9


@pytest.mark.parametrize("cache", ["paged", "radix"])
@pytest.mark.parametrize("num_blocks", [90, 52], ids=["roomy", "evicting"])
def test_a_prefix_is_found_where_all_groups_have_it(cache: str, num_blocks: int) -> None:
    """The same prompts again, and then with what they brought, one by one."""
    llm, first, asked = build("gemma3_text", cache, 1, num_blocks), 30, prompts(LENGTHS)
    longer = [prompt + ref.token_ids[:first] for prompt, ref in zip(asked, wanted("gemma3_text"), strict=True)]
    num_cached = []
    for wave, start in ((asked, 0), (asked, 0), (longer, first)):
        for prompt, ref in zip(wave, wanted("gemma3_text"), strict=True):
            with ReallyFloat64():
                (output,) = llm.generate([prompt], PARAMS.model_copy(update={"max_tokens": MAX_TOKENS - start}))
            assert list(output.token_ids) == ref.token_ids[start:]
            num_cached.append(output.metrics.num_cached_tokens)
    if num_blocks == 90:
        assert num_cached == [0, 0, 0, 0, 30, 5, 30, 60, 35]
    else:
        assert num_cached == [0, 0, 0, 0, 0, 0, 0, 60, 35], "beginnings are gone from the windowed layers' pool"
    check_nothing_left(llm)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("depth", [0, 1])
def test_samples_of_a_prompt_are_forked_in_every_group(cache: str, depth: int) -> None:
    """They share all of the prompt but its last token, and copy what is not full; nobody reads a block given up."""
    llm = build("gemma2", cache, depth, 90)
    tap, peaks = Tap(llm), Peaks(llm, spoils=cache == "paged without prefix")
    with ReallyFloat64():
        outputs = [llm.generate([prompts(LENGTHS)[at]], PARAMS.model_copy(update={"n": 3}))[0] for at in (1, 2)]
    for output, at in zip(outputs, (1, 2), strict=True):
        num_found = LENGTHS[at] - 1
        for completion, num_cached in zip(output.completions, (0, num_found, num_found), strict=True):
            assert list(completion.token_ids) == wanted("gemma2")[at].token_ids
            assert completion.metrics.num_cached_tokens == num_cached
    (copies,) = [plan.copies for plan in tap.plans if plan.copies is not None]
    assert [len(forks) for forks in (copies.forks, *copies.more_forks)] == [2, 2], "the first prompt ends with a block"
    assert {copy.num_tokens for forks in (copies.forks, *copies.more_forks) for copy in forks} == {2}
    assert peaks.of_one[1] < peaks.of_one[0]
    check_nothing_left(llm)
    assert all(not group.stats().num_used_blocks for group in peaks.groups)


def test_what_holds_everything_is_not_grouped() -> None:
    """A cache that releases nothing, requests that may wait in host memory, and windows that nobody outgrows."""
    for options in ({"cache": "contiguous"}, {"swap_gib": 0.001}, {"max_model_len": WINDOW}):
        llm = LLM(model_of("gemma2"), block_size=BLOCK_SIZE, num_blocks=ROOMY, fused=False, **cast(Any, options))
        allocator = llm.engine.planner.allocator
        assert not isinstance(allocator, GroupedCache) and allocator.spec == CacheSpec(ROOMY, BLOCK_SIZE)
        executor = cast(Any, llm.engine.executor)
        assert executor.backend is llm.attention and not executor.more_inputs
        assert len(executor.backend._pools) == len(model_of("gemma2").architecture.layers)


def test_groups_share_what_trial_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is metered the largest steps run first, in pools that have the same few blocks for every group."""
    free = 40 * build("gemma2").attention.bytes_per_block() + 2000
    meter = metered(monkeypatch, free, step_bytes=1000)
    scheduler = scheduler_options("continuous", CHUNK, BUDGET) | {"max_num_seqs": 3}
    llm = LLM(model_of("gemma2"), scheduler, block_size=BLOCK_SIZE, fused=False)
    assert [3, 3, 2] in meter.events and [1] * 3 in meter.events
    # The windowed layers, two of three, keep half of the 40 blocks; the full layer gets those bytes.
    assert [group.spec.num_blocks for group in groups_of(llm.engine.planner.allocator)] == [80, 20]
    tap = Tap(llm)
    with ReallyFloat64():
        assert error_of(tap, llm.generate(prompts(LENGTHS), PARAMS), wanted("gemma2")) < 1e-9


BUGS: dict[str, Bug] = {
    "a group runs with the first one's edits": (TorchExecutor._enqueue, "plan.of_group(number)", "plan"),
    "a group packs the first one's tables": (TorchExecutor._grouped, "inputs.build(plan)", "self.inputs.build(plan)"),
    "a group gets no edits": (TorchExecutor._enqueue, "inputs.apply(plan.of_group(number))", "pass"),
    "batches go to the wrong backends": (
        GroupedAttention.plan, "(batch, *batch.others)", "(*batch.others, batch)"),
    "all groups have the first one's batch": (
        GroupedBatch.of, "tuple(batches[1:])", "(batches[0],) * len(batches[1:])"),
    "layers are led to others' places": (
        GroupedAttention.forward, "backend.forward(place,", "backend.forward(max(0, place - 1),"),
    "edits of a group are the first one's": (Residency.more_edits, "_edit(group, one)", "_edit(self.groups[0], one)"),
    "a group's window is one key too narrow": (
        SharingCache.commit, "self.spec.num_hidden_blocks(",
        "CacheSpec(1, self.spec.block_size, self.spec.window and self.spec.window - 1).num_hidden_blocks("),
    "full layers release, and windowed ones keep": (
        build_allocator, "windows_of(backend), strict", "windows_of(backend)[::-1], strict"),
    "no group releases": (GroupedCache.commit, "in self.groups:", "in self.groups[:1]:"),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_groups_are_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, BUGS[bug])
    with pytest.raises(AssertionError):
        check_run("gemma2", "paged without prefix", 0, SCARCE)


@pytest.mark.cuda
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_blocks", [96, 14])
@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_graphs_give_what_eager_steps_give(name: str, depth: int, num_blocks: int) -> None:
    """Gemma 2's layers, and fused ones of Qwen 2, with a window of 48 keys: prompts of up to 150 tokens and 40 more."""
    scheduler = {"name": "continuous", "max_chunk_tokens": 40, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    outputs = []
    for graphs, blocks, steps in ((False, 96, 0), (True, num_blocks, depth)):
        llm = LLM(
            real_shapes.loaded(name, "cuda"),
            scheduler,
            attention="flash",
            block_size=16,
            num_blocks=blocks,
            depth=steps,
            graphs=graphs,
        )
        allocator, executor = llm.engine.planner.allocator, cast(Any, llm.engine.executor)
        assert [group.spec.window for group in groups_of(allocator)] == [None, real_shapes.WINDOW]
        assert (executor.graphs is not None) == graphs
        outputs.append(llm.generate(real_shapes.prompts(8), real_shapes.greedy(40)))
        check_nothing_left(llm)
    for prompt, one, other in zip(real_shapes.prompts(8), *outputs, strict=True):
        assert one.error is None and other.error is None
        assert not real_shapes.unexplained(name, "cuda", prompt, one.token_ids, other.token_ids)
