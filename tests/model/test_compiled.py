"""Layers through torch's compiler: the same numbers, one compilation for all layers, and no trace left in the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmkit import SamplingParams
from llmkit.llm import LLM
from llmkit.model import compiled
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec
from tests.equality.zoo import ZOO, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about itself while it imports its compiler
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [3]]
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=1)
SAYS_WHY = "without torch's compiler"


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What is compiled runs as traced, which is all there is to see but inductor; the number of operators of each."""
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    yield seen
    torch._dynamo.reset()


def generate(model: LoadedModel, compiles: bool, prompts: list[list[int]] = PROMPTS) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their log-probabilities."""
    llm = LLM(model, fused=False, compile=compiles, block_size=4, num_blocks=32)
    outputs = llm.generate(prompts, PARAMS)
    assert not any(output.error for output in outputs)
    entries = [entry for output in outputs for entry in output.logprobs or ()]
    assert len(entries) == 5 * len(prompts)
    return [entry.token_id for entry in entries], torch.tensor([entry.logprob for entry in entries])


def check(model: LoadedModel, caplog: pytest.LogCaptureFixture, tolerance: float) -> None:
    with caplog.at_level(logging.WARNING):
        tokens, logprobs = generate(model, compiles=True)
    wanted_tokens, wanted = generate(model, compiles=False)
    assert SAYS_WHY not in caplog.text
    assert tokens == wanted_tokens
    assert torch.allclose(logprobs, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["smollm3", "gpt2", "mixtral"])
def test_traced_layers_give_the_same(name: str, traced: list[int], caplog: pytest.LogCaptureFixture) -> None:
    check(tiny_model(name), caplog, 1e-9)
    assert traced


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm3", "gemma2"])
def test_compiled_layers_give_the_same(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, but norms round through float32, and sums may have another order."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    check(tiny_model(name), caplog, 1e-5)


def test_all_layers_share_what_was_compiled_for_one(traced: list[int]) -> None:
    """Twice: for one token and for more; not for every number of tokens."""
    numbers = []
    for num_layers in (2, 9):
        torch._dynamo.reset()
        traced.clear()
        config = {**ZOO["gemma2"], "num_hidden_layers": num_layers, "layer_types": ["full_attention"] * num_layers}
        model = load_model(ModelSpec("deep", config=config), torch.float32, torch.device("cpu"))
        llm = LLM(model, fused=False, compile=True, block_size=4, num_blocks=64)
        for rows in (1, 3, 6):
            llm.generate([[5, 6, 7] * rows] * rows, PARAMS)
        numbers.append(len(traced))
    assert numbers[0] == numbers[1] <= 8


def test_nothing_is_left_in_the_model() -> None:
    model = tiny_model("smollm3")
    generate(model, compiles=True, prompts=[[3]])
    assert not any("forward" in vars(module) for module in model.module.modules())


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    with caplog.at_level(logging.WARNING):
        tokens, _ = generate(tiny_model("smollm3"), compiles=True)
    assert tokens == generate(tiny_model("smollm3"), compiles=False)[0]
    assert caplog.text.count(SAYS_WHY) == 1 and "no compiler here" in caplog.text


def test_fused_layers_are_not_compiled(traced: list[int]) -> None:
    llm = LLM(tiny_model("llama"), compile=True, block_size=4, num_blocks=32)
    llm.generate(PROMPTS, PARAMS)
    assert not traced


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_compiled_layers_in_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, through inductor, and captured: tokens of the same model without."""
    from tests.equality.real_shapes import greedy, loaded, prompts, unexplained

    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    outputs = []
    for compiles in (False, True):
        llm = LLM(loaded(name, "cuda"), attention="flash", fused=False, compile=compiles, block_size=16, num_blocks=96)
        executor: Any = llm.engine.executor
        assert executor.graphs is not None
        outputs.append([list(output.token_ids) for output in llm.generate(prompts(), greedy(16))])
    for prompt, one, other in zip(prompts(), *outputs, strict=True):
        assert not unexplained(name, "cuda", prompt, one, other)
