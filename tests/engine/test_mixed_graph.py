"""Steps with prompts as CUDA graphs: what the device works out of four integers a row, and what replays give."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmkit import LLM, SamplingParams
from llmkit.engine.inputs import InputBuilder
from llmkit.engine.mixed_graph import ROWS, TOKENS, Device, MixedGraphs, columns, pack
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec
from llmkit.types import BlockTableEdit, ScheduledRequest, StepPlan
from tests.engine.test_decode_graph import CONFIG

SEATS, BLOCK, REACH = 6, 4, 60


def device(tables: torch.Tensor) -> Device:
    tokens = torch.randint(1, 1000, (SEATS + 1, REACH + 1), generator=torch.Generator().manual_seed(0))
    backend: Any = SimpleNamespace(requirements=SimpleNamespace(block_size=BLOCK))
    nothing: Any = None
    return Device(nothing, backend, nothing, tokens, tables, nothing)


@pytest.mark.parametrize("seed", range(30))
def test_the_device_packs_rows_as_the_host_does(seed: int) -> None:
    rng = random.Random(seed)
    slots = rng.sample(range(SEATS), rng.randint(1, SEATS))
    rows = []
    for slot in slots:
        start = rng.randint(0, REACH - 2)
        rows.append(ScheduledRequest("", slot, start, rng.choice([1, rng.randint(1, REACH - start)]), True, 0))
    builder = InputBuilder(SEATS, REACH, BLOCK)
    blocks = rng.sample(range(500), SEATS * REACH // BLOCK)
    width = REACH // BLOCK
    edits = [BlockTableEdit(slot, 0, tuple(blocks[slot * width : (slot + 1) * width])) for slot in range(SEATS)]
    plan = StepPlan(0, tuple(rows), (), tuple(edits))
    builder.apply(plan)
    wanted = builder.build(plan)
    tables = torch.cat([torch.from_numpy(builder.block_tables), torch.zeros(1, width, dtype=torch.int32)])
    made, num = device(tables), len(wanted.positions)
    num_rows, num_tokens = len(rows) + rng.randint(0, 3), num + rng.randint(0, 40)
    ids, batch = pack(made, torch.from_numpy(columns(rows, num_rows, made.spare)), num_tokens)
    assert ids[:num].tolist() == made.tokens[wanted.token_slots, wanted.positions].tolist()
    assert batch.positions.tolist() == [*wanted.positions, *[0] * (num_tokens - num)]
    assert batch.slot_mapping.tolist() == [*wanted.slot_mapping, *[-1] * (num_tokens - num)]
    assert batch.seq_lens.tolist() == [*wanted.seq_lens, *[0] * (num_rows - len(rows))]
    ends = wanted.query_start_loc.tolist()
    assert batch.query_start_loc.tolist() == ends + [num] * (num_rows - len(rows))
    for row, length in enumerate(wanted.seq_lens):
        seen = -(-length // BLOCK)
        assert batch.block_table[row, :seen].tolist() == wanted.block_table[row, :seen].tolist()


def test_rows_that_do_not_sample_leave_the_token_table_alone() -> None:
    rows = [ScheduledRequest("", 3, 0, 5, False, 0), ScheduledRequest("", 1, 7, 1, True, 0)]
    assert columns(rows, 3, SEATS).tolist() == [[3, 1, SEATS], [0, 7, 0], [5, 1, 0], [SEATS, 1, SEATS]]


def test_what_fits_a_graph() -> None:
    graphs = MixedGraphs(device(torch.zeros(SEATS + 1, REACH // BLOCK, dtype=torch.int32)))
    prompt = ScheduledRequest("", 0, 0, TOKENS[-1], True, 0)
    assert graphs.takes([prompt]) and not graphs.takes([prompt._replace(num_tokens=TOKENS[-1] + 1)])
    single = prompt._replace(num_tokens=1)
    assert graphs.takes([single] * ROWS[-1]) and not graphs.takes([single] * (ROWS[-1] + 1))


@pytest.mark.parametrize("sizes", [TOKENS, ROWS])
def test_sizes_fill_up_by_at_most_as_much_again(sizes: tuple[int, ...]) -> None:
    assert all(less < more <= 4 * less for less, more in pairwise(sizes))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(ModelSpec("small", config=CONFIG, seed=1), torch.bfloat16, torch.device("cuda"))


def generate(model: LoadedModel, params: list[SamplingParams], budget: int, **options: Any) -> list[Any]:
    """Prompts of many lengths that join at different steps, in chunks of `budget` tokens a step."""
    limits = {"name": "continuous", "max_num_seqs": 8, "max_num_batched_tokens": budget}
    llm = LLM(model, limits, {"name": "paged", "prefix": False}, attention="flash", dtype="bfloat16", **options)
    prompts = [[(7 * row + i) % 500 + 2 for i in range(1 + 29 * row % 131)] for row in range(len(params))]
    outputs = llm.generate(prompts, params)
    assert llm.engine.planner.allocator.stats().num_used_blocks == 0
    graphs = llm.engine.executor.graphs  # type: ignore[attr-defined]
    if graphs is not None:
        assert graphs.mixed is not None and graphs.mixed._captured
    return outputs


def lengths(number: int) -> list[int]:
    return [3 + 5 * row % 11 for row in range(number)]


@pytest.mark.cuda
@pytest.mark.parametrize("budget", [40, 200])
@pytest.mark.parametrize("depth", [0, 1])
def test_replay_is_as_likely_as_eager(model: LoadedModel, budget: int, depth: int) -> None:
    """Sums of other lengths round otherwise, so tokens may part where two are nearly equally likely; not elsewhere."""
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, logprobs=2) for n in lengths(20)]
    wanted = generate(model, params, budget, graphs=False, depth=0)
    got = generate(model, params, budget, depth=depth)
    num_equal = 0
    for one, other in zip(wanted, got, strict=True):
        for index, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
            best = [logprob for _, logprob in one.logprobs[index].top]
            if a != b:
                assert best[0] - best[1] < 0.1
                break
            assert abs(one.logprobs[index].logprob - other.logprobs[index].logprob) < 0.1
            num_equal += 1
    assert num_equal > 0.9 * sum(lengths(20))


@pytest.mark.cuda
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_chosen_in_the_graph_are_those_of_its_logits(model: LoadedModel, temperature: float) -> None:
    ask = {"temperature": temperature, "ignore_eos": True}
    plain = [SamplingParams(max_tokens=n, seed=n, **ask) for n in lengths(20)]
    asking = [SamplingParams(max_tokens=n, seed=n, logprobs=1, **ask) for n in lengths(20)]
    wanted = [output.token_ids for output in generate(model, asking, 60, depth=1)]
    assert [output.token_ids for output in generate(model, plain, 60, depth=1)] == wanted


@pytest.mark.cuda
def test_graphs_take_turns_in_their_memory(model: LoadedModel) -> None:
    """Logits of one graph lie where another has what it works with."""
    llm = LLM(model, {"name": "continuous", "max_num_seqs": 300}, attention="flash", dtype="bfloat16")
    graphs = llm.engine.executor.graphs.mixed  # type: ignore[attr-defined]
    for num_tokens in TOKENS[:3]:
        graphs._captured[256, num_tokens] = graphs.capture(256, num_tokens)
    held = torch.cuda.memory_allocated()
    for num_tokens in TOKENS[3:6]:
        graphs._captured[256, num_tokens] = graphs.capture(256, num_tokens)
    assert torch.cuda.memory_allocated() - held < 256 * 512 * 2  # less than the logits of one
