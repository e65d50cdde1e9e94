"""The steps that are run once before the pool exists, and the pool that gets what they leave."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmkit import LLM, CapacityError, SamplingParams
from llmkit.engine import assembly, trial
from llmkit.engine.executor import TorchExecutor
from llmkit.engine.trial import largest_plans, largest_prompts
from llmkit.interfaces.attention import AttentionBackend
from llmkit.model.loading import LoadedModel
from llmkit.model.memory import CudaMeter, free_bytes
from llmkit.model.network import LayerAttention, Network
from tests.tiny_llm import BLOCK_SIZE, MAX_MODEL_LEN, tiny

BLOCK_BYTES = 2 * 2 * 2 * 8 * BLOCK_SIZE * 8  # keys and values, layers, heads, dimensions, slots, float64
LIMITS = {"name": "continuous", "max_num_seqs": 5, "max_num_batched_tokens": 64}


class Meter:
    """Says that every step takes `step_bytes`, and keeps what happened when."""

    def __init__(self, step_bytes: int) -> None:
        self.step_bytes = step_bytes
        self.events: list[object] = []

    def start(self) -> None:
        self.events.append("start")

    def taken(self) -> int:
        self.events.append("taken")
        return self.step_bytes


def metered(monkeypatch: pytest.MonkeyPatch, free: int, step_bytes: int = 1000) -> Meter:
    """A device with `free` bytes beside the weights, whose memory can be metered."""
    meter = Meter(step_bytes)
    launch = TorchExecutor.launch

    def noted(self: TorchExecutor, plan: object) -> object:
        meter.events.append([row.num_tokens for row in plan.scheduled])  # type: ignore[attr-defined]
        return launch(self, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(assembly, "meter_of", lambda device: meter)
    monkeypatch.setattr(assembly, "free_bytes", lambda device, share: free)
    monkeypatch.setattr(TorchExecutor, "launch", noted)
    return meter


def tokens_of(llm: LLM) -> list[tuple[int, ...]]:
    prompts = [[5 + row + i for i in range(3 + 7 * row)] for row in range(6)]
    return [output.token_ids for output in llm.generate(prompts, SamplingParams(max_tokens=9, temperature=0.0))]


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [((5, 64, 128), [13, 13, 13, 13, 12]), ((2, 64, 20), [20, 20]), ((8, 3, 128), [1, 1, 1]), ((1, 64, 64), [64])],
)
def test_the_largest_step_fills_every_limit(limits: tuple[int, int, int], lengths: list[int]) -> None:
    assert largest_prompts(*limits) == lengths
    prompts, decodes = largest_plans(lengths, limits[2], BLOCK_SIZE)
    assert prompts.num_tokens == sum(lengths) and decodes.num_tokens == len(lengths)
    (blocks,) = {edit.blocks for edit in prompts.edits}
    assert all(row.start < limits[2] and row.start // BLOCK_SIZE in blocks for row in decodes.scheduled)


def test_the_pool_gets_what_two_trial_steps_leave_and_its_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"scheduler": LIMITS, "block_size": BLOCK_SIZE, "max_model_len": 64}
    wanted = tokens_of(LLM(tiny(), **options))
    meter = metered(monkeypatch, free=40 * BLOCK_BYTES + 2000, step_bytes=1000)
    llm = LLM(tiny(), **options)
    assert meter.events == ["start", [13, 13, 13, 13, 12], "taken", "start", [1] * 5, [13, 13, 13, 13, 12], "taken"]
    assert llm.engine.planner.allocator.spec.num_blocks == 40
    assert not any(pool.any() for pool in llm.attention._pools), "the trial wrote to the pool"
    assert tokens_of(llm) == wanted


def test_attention_is_rehearsed_before_the_network_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU its kernels compile meanwhile; here the steps simply run."""
    meter, build = metered(monkeypatch, free=40 * BLOCK_BYTES), assembly.build_network
    layers: list[int] = []

    def run(device: torch.device, *steps: Callable[[], object]) -> Callable[[], None]:
        for step in steps:
            step()
        return lambda: meter.events.append("compiled")

    def noted(model: LoadedModel, backend: AttentionBackend, *more: Any) -> Network:
        meter.events.append("network")
        return build(model, backend, *more)

    def attend(self: LayerAttention, *tensors: torch.Tensor) -> torch.Tensor:
        layers.append(self._layer)
        return self._backend.forward(self._layer, *tensors)

    monkeypatch.setattr(trial, "compile_ahead", run)
    monkeypatch.setattr(assembly, "build_network", noted)
    monkeypatch.setattr(LayerAttention, "__call__", attend)
    LLM(tiny(), scheduler=LIMITS, block_size=BLOCK_SIZE, max_model_len=64)
    assert meter.events[:5] == [[13, 13, 13, 13, 12], [1] * 5, "network", "compiled", "start"]
    assert len(set(layers[:2])) == 1, "one layer of a kind is enough"


def test_a_pool_smaller_than_a_request_bounds_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    metered(monkeypatch, free=8 * BLOCK_BYTES + 2000)
    llm = LLM(tiny(), scheduler=LIMITS, block_size=BLOCK_SIZE)
    assert llm.engine.limits.max_model_len == 8 * BLOCK_SIZE < MAX_MODEL_LEN


@pytest.mark.parametrize(
    ("step_bytes", "num_blocks", "says"),
    [
        (
            20 * BLOCK_BYTES,
            None,
            "no room for a KV cache: one block takes 0.0 MiB, 0.0 MiB are free beside weights and ",
        ),
        (15 * BLOCK_BYTES, 30, "engine.num_blocks=30 needs 0.00 GiB of KV cache, but 0.00 GiB are free: num_blocks=10"),
    ],
)
def test_what_does_not_fit_beside_a_step_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, step_bytes: int, num_blocks: int | None, says: str
) -> None:
    metered(monkeypatch, 40 * BLOCK_BYTES, step_bytes)
    with pytest.raises(CapacityError) as error:
        LLM(tiny(), scheduler=LIMITS, block_size=BLOCK_SIZE, num_blocks=num_blocks)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_a_step_that_does_not_fit_at_all_names_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    metered(monkeypatch, 40 * BLOCK_BYTES)

    def full(self: TorchExecutor, plan: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(TorchExecutor, "launch", full)
    with pytest.raises(CapacityError) as error:
        LLM(tiny(), scheduler=LIMITS, block_size=BLOCK_SIZE)
    assert str(error.value).startswith("no room beside the weights for a step of 64 tokens in 5 requests: lower sched")


@pytest.mark.cuda
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_an_engine_stays_within_its_share_of_the_gpu(share: float, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    caplog.set_level(logging.INFO)
    llm = LLM("qwen3_0_6b", max_model_len=4096, gpu_memory_utilization=share)
    prompts = [[7] * 2048 for _ in range(256)]
    llm.generate(prompts, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    assert torch.cuda.max_memory_reserved() <= share * total
    held = total - torch.cuda.mem_get_info()[0] - (total - free)
    assert held <= share * total and free_bytes(device, share) < 0.02 * total, "memory is left over"


@pytest.mark.cuda
def test_the_meter_sees_what_was_taken_and_given_back() -> None:
    meter = CudaMeter(torch.device("cuda"))
    meter.start()
    torch.empty(100 << 20, dtype=torch.uint8, device="cuda")
    assert 100 << 20 <= meter.taken() < 140 << 20
    meter.start()
    assert meter.taken() == 0
