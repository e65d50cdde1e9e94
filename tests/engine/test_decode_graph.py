"""Decode steps replayed as CUDA graphs give what eager steps give, whatever the number of rows."""

from __future__ import annotations

from array import array
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from llmkit import LLM, SamplingParams
from llmkit.engine import decode_graph
from llmkit.engine.decode_graph import MAX_ROWS, DecodeGraphs, buckets_up_to
from llmkit.engine.repeats import num_repeated_keys
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.sampling import Sampler
from llmkit.model.spec import ModelSpec
from llmkit.rows import DecodeRows, Lineup
from llmkit.types import StepPlan

CONFIG = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True, "initializer_range": 0.4,
}  # fmt: skip


@pytest.mark.parametrize("max_rows", [1, 2, 5, 64, 100, 256, 300, 1024, 4096])
def test_buckets_reach_the_number_of_rows_and_no_further(max_rows: int) -> None:
    sizes = buckets_up_to(max_rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(max_rows, MAX_ROWS)
    assert all(size <= 64 + before * 2 for before, size in pairwise(sizes))


def test_steps_whose_rows_share_enough_have_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: which graphs are asked for, and that rows are counted once for each lineup."""
    asked, counted = [], []

    def capture(self: DecodeGraphs, size: int, repeated: int) -> Any:
        asked.append((size, repeated))
        return SimpleNamespace(replay=Mock())

    def count(*given: Any) -> int:
        counted.append(given)
        return num_repeated_keys(*given)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    monkeypatch.setattr(decode_graph, "num_repeated_keys", count)
    backend = SimpleNamespace(requirements=SimpleNamespace(block_size=4), reads_once=lambda number: number >= 16)
    tables = np.arange(32, dtype=np.int32).reshape(4, 8)
    tables[1:3, :2] = tables[0, :2]
    graphs = DecodeGraphs(Mock(), backend, Mock(), torch.zeros(5, 33, dtype=torch.int64), tables)  # type: ignore[arg-type]
    apart, together = (
        Lineup(("x",) * len(slots), *(array("q", column) for column in (slots, slots, [8] * len(slots))))
        for slots in ([0, 3], [0, 1, 2])
    )
    for lineup in (apart, together, apart):
        for shift in range(3):
            graphs.run(StepPlan(0, DecodeRows(lineup, shift)))
    assert asked == [(2, 0), (4, 16)] and len(counted) == 3


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(ModelSpec("small", config=CONFIG, seed=1), torch.bfloat16, torch.device("cuda"))


def generate(model: LoadedModel, num_rows: int, params: list[SamplingParams], **options: object) -> list[list[int]]:
    llm = LLM(model, {"name": "continuous", "max_num_seqs": 16}, attention="flash", dtype="bfloat16", **options)
    assert (llm.engine.executor.graphs is not None) == options.get("graphs", True)  # type: ignore[attr-defined]
    prompts = [[(7 * row + i) % 500 + 2 for i in range(1 + 5 * row % 37)] for row in range(num_rows)]
    outputs = llm.generate(prompts, params)
    assert llm.engine.planner.allocator.stats().num_used_blocks == 0
    return [list(output.token_ids) for output in outputs]


@pytest.mark.cuda
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 16, 23])
@pytest.mark.parametrize("depth", [0, 1])
def test_replay_equals_eager(model: LoadedModel, num_rows: int, depth: int) -> None:
    params = [SamplingParams(max_tokens=10 + row * 3 % 17, ignore_eos=True) for row in range(num_rows)]
    wanted = generate(model, num_rows, params, graphs=False, depth=0)
    assert len({token for tokens in wanted for token in tokens}) > 5
    assert generate(model, num_rows, params, depth=depth) == wanted


@pytest.mark.cuda
def test_rows_that_sample_or_ask_for_more(model: LoadedModel) -> None:
    def fail(token_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits[1:] if len(token_ids) > 35 else logits

    asks: list[dict[str, Any]] = [
        {}, {"temperature": 0.8, "seed": 3}, {"logprobs": 2}, {"min_tokens": 5}, {"repetition_penalty": 1.3},
        {"logits_processors": (lambda token_ids, logits: logits.index_fill(0, token_ids, -torch.inf),)},
        {"logits_processors": (fail,), "temperature": 0.8},
    ]  # fmt: skip
    params = [SamplingParams(max_tokens=12, **({"temperature": 0.0} | ask)) for ask in asks]
    outputs = generate(model, 7, params, depth=1)
    assert outputs == generate(model, 7, params, graphs=False, depth=0)
    assert len(outputs[6]) == 5, "its prompt has 31 tokens; it fails with 36"


@pytest.mark.cuda
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("depth", [0, 1])
def test_forks_join_in_a_graph_behind_the_copies_of_their_blocks(model: LoadedModel, prefix: bool, depth: int) -> None:
    params, found = SamplingParams(n=5, max_tokens=40, temperature=0.8, seed=3, ignore_eos=True), []
    for graphs in (False, True):
        cache = {"name": "paged", "prefix": prefix}
        llm = LLM(model, "continuous", cache, "flash", dtype="bfloat16", block_size=16, graphs=graphs, depth=depth)
        executor, num_copied = llm.engine.executor, []
        launch = executor.launch

        def counting(plan: StepPlan, launch: Any = launch, num_copied: list[int] = num_copied) -> Any:
            num_copied += [] if plan.copies is None else [len(plan.copies.forks)]
            return launch(plan)

        executor.launch = counting  # type: ignore[method-assign]
        outputs = llm.generate([[(7 * row + i) % 500 + 2 for i in range(21 + 9 * row)] for row in range(3)], params)
        found.append([sample.token_ids for output in outputs for sample in output.completions])
        assert sum(num_copied) == 12 and llm.engine.planner.allocator.stats().num_used_blocks == 0
    assert found[0] == found[1] and len({*found[0]}) == 15


@pytest.mark.cuda
def test_rows_that_only_draw_are_chosen_in_the_graph(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of prompts too; what an engine samples while it is built is left out."""
    params = [SamplingParams(max_tokens=20, temperature=0.5 * row, seed=row, ignore_eos=True) for row in range(6)]
    wanted = generate(model, 6, params, graphs=False, depth=0)
    calls: list[int] = []
    sample, run = Sampler.sample, LLM.generate

    def counting(*given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "sample", lambda *rows: (calls.append(1), sample(*rows))[1])
            return run(*given)

    monkeypatch.setattr(LLM, "generate", counting)
    assert generate(model, 6, params, depth=1) == wanted
    assert not calls
    assert generate(model, 6, params, graphs=False, depth=1) == wanted
    assert len(calls) >= 20
