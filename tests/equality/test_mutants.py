"""The equality tests bite: engines with one small, typical mistake each are told from a right one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llmkit import LayerSpec, StepPlan
from llmkit.engine.executor import TorchExecutor, _Launched
from llmkit.engine.inputs import InputBuilder, PackedInputs
from llmkit.llm import LLM
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import BLOCK_SIZE, GREEDY, ROOMY, Tap, error_of, prompts, references
from tests.equality.zoo import tiny_model
from tests.testing.test_mutants import Bug, plant

Mutate = Callable[[pytest.MonkeyPatch], None]


def is_right(model: str, change: Callable[[LayerSpec], LayerSpec] | None = None) -> bool:
    """Whether a run of the engine, its layers changed by `change`, equals transformers."""
    loaded, wanted = tiny_model(model), references(model)
    if change is not None:
        layers = {name: change(spec) for name, spec in loaded.architecture.layers.items()}
        loaded = replace(loaded, architecture=replace(loaded.architecture, layers=layers))
    scheduler = {"name": "continuous", "max_chunk_tokens": BLOCK_SIZE + 1}
    llm = LLM(loaded, scheduler, block_size=BLOCK_SIZE, num_blocks=ROOMY, fused=False)
    tap = Tap(llm)
    with ReallyFloat64():
        outputs = llm.generate(prompts(), GREEDY)
    try:
        return error_of(tap, outputs, wanted) < 1e-9
    except AssertionError:
        return False


def wider_window(spec: LayerSpec) -> LayerSpec:
    return replace(spec, window=spec.window + 1) if spec.window else spec


def narrower_window(spec: LayerSpec) -> LayerSpec:
    return replace(spec, window=spec.window - 1) if spec.window else spec


def no_window(spec: LayerSpec) -> LayerSpec:
    return replace(spec, window=None)


def no_softcap(spec: LayerSpec) -> LayerSpec:
    return replace(spec, softcap=None)


def other_scale(spec: LayerSpec) -> LayerSpec:
    return replace(spec, scale=spec.scale * 1.001)


@pytest.mark.parametrize("model", ["llama", "mistral", "gemma2", "gpt2"])
def test_the_engine_itself_is_right(model: str) -> None:
    assert is_right(model)


@pytest.mark.mutant
@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("mistral", wider_window),
        ("mistral", narrower_window),
        ("gemma2", no_window),
        ("gemma2", no_softcap),
        ("llama", other_scale),
    ],
)
def test_wrong_layers_are_noticed(model: str, change: Callable[[LayerSpec], LayerSpec]) -> None:
    assert not is_right(model, change)


def slots_off_by_one(packed: PackedInputs) -> PackedInputs:
    return replace(packed, slot_mapping=packed.slot_mapping + 1)


def last_key_unseen(packed: PackedInputs) -> PackedInputs:
    return replace(packed, seq_lens=packed.seq_lens - (packed.seq_lens > 1).astype(np.int32))


def other_rows_blocks(packed: PackedInputs) -> PackedInputs:
    return replace(packed, block_table=packed.block_table[::-1].copy())


def logits_of_the_token_before(packed: PackedInputs) -> PackedInputs:
    return replace(packed, logit_tokens=np.maximum(packed.logit_tokens - 1, 0))


@pytest.mark.mutant
@pytest.mark.parametrize("mistake", [slots_off_by_one, last_key_unseen, other_rows_blocks, logits_of_the_token_before])
def test_wrong_inputs_are_noticed(
    mistake: Callable[[PackedInputs], PackedInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = InputBuilder.build
    monkeypatch.setattr(InputBuilder, "build", lambda self, plan: mistake(build(self, plan)))
    assert not is_right("llama")


@pytest.mark.mutant
def test_a_stale_block_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = InputBuilder.apply

    def without_growth(self: InputBuilder, plan: StepPlan) -> None:
        apply(self, replace(plan, edits=tuple(edit for edit in plan.edits if edit.start == 0)))

    monkeypatch.setattr(InputBuilder, "apply", without_growth)
    assert not is_right("llama")


@pytest.mark.mutant
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_positions_off_by_one_are_noticed(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only behind the first token: rotary embeddings do not see a shift of everything."""
    from llmkit.model.network import GeneralNetwork

    call = GeneralNetwork.__call__

    def shifted(self: Any, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return call(self, ids, positions + (positions > 0), rows)

    monkeypatch.setattr(GeneralNetwork, "__call__", shifted)
    assert not is_right(model)


RUNNER: dict[str, Bug] = {
    "prompts stand one place late": (
        TorchExecutor._admit, "slot, : len(tokens)]", "slot, 1 : 1 + len(tokens)]"),
    "a prompt is written one token short": (
        TorchExecutor._admit, "slot, : len(tokens)] = to_device(tokens,",
        "slot, : len(tokens) - 1] = to_device(tokens[:-1],"),
    "sampled tokens overwrite the ones before": (
        TorchExecutor._choose, "to_device(ends, device)]", "to_device([end - 1 for end in ends], device)]"),
    "sampled tokens go to other slots": (
        TorchExecutor._choose, "to_device(slots, device)", "to_device(slots[::-1], device)"),
    "input ids are of the positions before": (
        TorchExecutor._enqueue, "self.tokens[token_slots, positions]",
        "self.tokens[token_slots, (positions - 1).clamp(min=0)]"),
    "edits come a step late": (
        TorchExecutor._enqueue, "self.inputs.apply(plan)",
        "vars(self).pop('late', lambda: None)(); self.late = lambda: self.inputs.apply(plan)"),
    "logits are of other rows": (
        TorchExecutor._enqueue, "self._sample(logits[:num_sampling]", "self._sample(logits[:num_sampling].flip(0)"),
    "results go to other rows": (
        _Launched.wait, "token_ids = self.sampled.tolist()", "token_ids = self.sampled.tolist()[::-1]"),
    "results of rows that sample beside others are lost": (_Launched.wait, "token_ids[row] = token_id", "pass"),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", RUNNER)
def test_bugs_of_the_runner_are_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, RUNNER[bug])
    assert not is_right("llama")


@pytest.mark.mutant
def test_a_lost_key_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of every step is not written to the cache of the last layer."""
    from llmkit_attention.sdpa import SdpaAttention

    forward = SdpaAttention.forward

    def losing(self: Any, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if layer == 2:
            key = key.clone()
            key[0] = 0
        return forward(self, layer, query, key, value)

    monkeypatch.setattr(SdpaAttention, "forward", losing)
    assert not is_right("llama")
