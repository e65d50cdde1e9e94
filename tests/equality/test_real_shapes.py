"""Models with real head dimensions in bfloat16: logits and tokens against transformers, on a GPU with `flash`.

The same on a CPU with `sdpa` for one shape: it shows that the measure is right where nothing else is new.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkit import LLM, RequestOutput
from llmkit.engine.decode_graph import buckets_up_to
from tests.equality.real_shapes import SHAPES, greedy, loaded, prompts, truth, unexplained
from tests.equality.runs import Tap

BLOCK_SIZE, CHUNK = 16, 40
NUM_TOKENS = {"cpu": 6, "cuda": 24}
MOE = {"mixtral", "qwen3_moe"}
"""Rounding may send a token to another expert, so that single positions differ by much, here and in transformers."""
CASES = [("gemma2", "cpu"), *(pytest.param(name, "cuda", marks=pytest.mark.cuda) for name in SHAPES)]
MAX_ROWS = 1024


def build(name: str, device: str, num_blocks: int = 96, scheduler: dict[str, Any] | None = None, **options: Any) -> LLM:
    return LLM(
        loaded(name, device),
        {"name": "continuous", "max_chunk_tokens": CHUNK} | (scheduler or {}),
        attention="flash" if device == "cuda" else "sdpa",
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        **options,
    )


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    assert not any(output.error for output in outputs)
    return [list(output.token_ids) for output in outputs]


@pytest.mark.parametrize(("name", "device"), CASES)
def test_as_near_to_float32_as_transformers(name: str, device: str) -> None:
    """Logits of every token, given all before it, and no token that is worse than rounding explains."""
    llm = build(name, device, graphs=False, depth=0)
    tap = Tap(llm)
    outputs = llm.generate(prompts(), greedy(NUM_TOKENS[device]))
    ours, theirs, gaps = [], [], []
    for number, output in enumerate(outputs):
        prompt, token_ids = list(output.prompt_token_ids), list(output.token_ids)
        said = truth(name, device, prompt, token_ids)
        got = tap.of(number, prompt, len(token_ids)).float().cpu()
        ours.append((got - said.logits).abs().amax(-1))
        theirs.append(said.error)
        gaps += [said.gap(position, token_id) for position, token_id in enumerate(token_ids)]
    error, allowed = torch.cat(ours), torch.cat(theirs)
    assert error.median() <= 1.5 * allowed.median()
    assert name in MOE or error.max() <= 2 * allowed.max()
    assert max(gaps) <= 2 * allowed.max()
    assert len({token for tokens in tokens_of(outputs) for token in tokens}) > 2 * len(outputs)


@pytest.mark.cuda
@pytest.mark.parametrize("name", SHAPES)
def test_all_of_them_have_fused_layers_in_graphs(name: str) -> None:
    llm = build(name, "cuda")
    executor: Any = llm.engine.executor
    assert type(executor.network).__name__ == "FusedNetwork", llm.model.fused
    assert executor.graphs is not None


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["gemma2", *sorted(MOE)])
def test_transformers_own_layers_in_graphs(name: str) -> None:
    """Experts included: transformers groups them without asking the device how many tokens each has."""
    wanted, got = (build(name, "cuda", fused=False, graphs=graphs) for graphs in (False, True))
    executor: Any = got.engine.executor
    assert executor.graphs is not None
    both = (tokens_of(llm.generate(prompts(), greedy(24))) for llm in (wanted, got))
    for prompt, one, other in zip(prompts(), *both, strict=True):
        assert not unexplained(name, "cuda", prompt, one, other)


@pytest.mark.cuda
@pytest.mark.parametrize("name", SHAPES)
def test_graphs_and_depths_give_the_same_tokens(name: str) -> None:
    wanted = tokens_of(build(name, "cuda", graphs=False, depth=0).generate(prompts(), greedy(24)))
    for graphs, depth in ((False, 1), (True, 0), (True, 1)):
        got = tokens_of(build(name, "cuda", graphs=graphs, depth=depth).generate(prompts(), greedy(24)))
        for prompt, one, other in zip(prompts(), wanted, got, strict=True):
            assert not unexplained(name, "cuda", prompt, one, other), (graphs, depth)


def test_depths_give_the_same_tokens_on_a_cpu() -> None:
    zero, one = (tokens_of(build("gemma2", "cpu", depth=depth).generate(prompts(3), greedy(4))) for depth in (0, 1))
    for prompt, wanted, got in zip(prompts(3), zero, one, strict=True):
        assert not unexplained("gemma2", "cpu", prompt, wanted, got)


@pytest.mark.cuda
def test_replay_equals_eager_on_both_sides_of_every_bucket() -> None:
    """Batches as large as a graph, and one larger, which fill the next one up with rows of length 0."""
    everybody = [prompt[: 1 + 7 * row % 40] for row, prompt in enumerate(prompts(MAX_ROWS))]
    scheduler = {"max_num_seqs": MAX_ROWS, "max_num_batched_tokens": 65536, "max_chunk_tokens": 0}
    replayed, eager = (
        build("qwen3", "cuda", 4 * MAX_ROWS, scheduler, graphs=graphs, depth=0, max_model_len=64)
        for graphs in (True, False)
    )
    executor: Any = replayed.engine.executor
    assert executor.graphs is not None
    for size in buckets_up_to(MAX_ROWS):
        for num_rows in {size, min(size + 1, MAX_ROWS)}:
            rows = everybody[:num_rows]
            wanted, got = (tokens_of(llm.generate(rows, greedy(4))) for llm in (eager, replayed))
            for prompt, one, other in zip(rows, wanted, got, strict=True):
                assert not unexplained("qwen3", "cuda", prompt, one, other), num_rows
