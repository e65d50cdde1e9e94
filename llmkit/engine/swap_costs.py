"""Measures what swapping costs and what it saves, on the executor that is going to do it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from llmkit.engine.executor import TorchExecutor
from llmkit.engine.swapping import SwapCosts
from llmkit.sampling_params import SamplingParams
from llmkit.types import Admission, BlockTableEdit, ScheduledRequest, StepPlan

log = logging.getLogger(__name__)
NUM_REPEATS = 3
MAX_BLOCKS = 64


def measure_costs(executor: TorchExecutor, num_tokens: int, num_blocks: int) -> SwapCosts:
    """Time a prompt of `num_tokens` and copies of up to `num_blocks` blocks, in an idle pool that has room for them."""
    device = executor.tokens.device
    block_size = executor.inputs.block_size
    blocks = tuple(range(-(-num_tokens // block_size)))
    row = ScheduledRequest("", 0, 0, num_tokens, False, 0)
    admission = Admission(0, "", (0,) * num_tokens, num_tokens, SamplingParams(), 0)
    plan = StepPlan(0, (row,), (admission,), (BlockTableEdit(0, 0, blocks),))
    timer, executor.timer = executor.timer, None  # it counts steps of requests only
    per_token = _seconds(lambda: executor.launch(plan).wait(), device) / num_tokens
    executor.timer = timer
    few, many = ([*range(num)] for num in (1, min(num_blocks, MAX_BLOCKS)))
    one = _seconds(lambda: _there_and_back(executor, few), device)
    per_block = max(0.0, _seconds(lambda: _there_and_back(executor, many), device) - one) / max(1, len(many) - 1)
    costs = SwapCosts(per_token, max(0.0, one - per_block), per_block)
    log.info("swapping: a prompt token takes %.2g s, a block there and back %.2g s", per_token, per_block)
    return costs


@torch.inference_mode()
def _there_and_back(executor: TorchExecutor, blocks: list[int]) -> None:
    executor.backend.save_blocks(blocks, blocks)
    executor.backend.restore_blocks(blocks, blocks)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few runs, the first not counted."""
    seconds = []
    for _ in range(NUM_REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
