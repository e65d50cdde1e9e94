"""The largest steps there can be, run once in a pool of few blocks: what they take is what the pool has to leave free.

They also load kernels and libraries, so that the first request does not wait for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from llmkit.engine.executor import TorchExecutor
from llmkit.engine.mixed_graph import TOKENS
from llmkit.errors import CapacityError
from llmkit.interfaces.scheduler import SchedulerSettings
from llmkit.model.memory import Meter
from llmkit.model.rehearsal import rehearse
from llmkit.sampling_params import SamplingParams
from llmkit.types import Admission, BlockTableEdit, ScheduledRequest, StepPlan

log = logging.getLogger(__name__)


def bytes_of_largest_steps(
    make_executor: Callable[[int], TorchExecutor], limits: SchedulerSettings, max_model_len: int, meter: Meter
) -> int:
    """Most device memory that steps take beside weights and pool, those of CUDA graphs included.

    `make_executor` makes an executor over a pool of so many blocks, which is dropped here. Raises CapacityError if
    there is no room for a step.
    """
    lengths = largest_prompts(limits.max_num_seqs, limits.max_num_batched_tokens, max_model_len)
    meter.start()
    try:
        executor = make_executor(lengths[0])
        block_size = executor.inputs.block_size
        prompts, decodes = largest_plans(lengths, max_model_len, block_size)
        rehearse(executor.tokens.device, lambda: executor.launch(prompts), lambda: executor.launch(decodes))
        executor.launch(prompts).wait()
        taken = meter.taken()
        # Graphs keep what they need to themselves, all of them the same memory.
        num_captured = min(limits.max_num_batched_tokens, TOKENS[-1])
        captured = largest_prompts(limits.max_num_seqs, num_captured, max_model_len)
        meter.start()
        executor.launch(decodes).wait()
        executor.launch(largest_plans(captured, max_model_len, block_size)[0]).wait()
        taken += meter.taken()
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"no room beside the weights for a step of {sum(lengths)} tokens in {len(lengths)} requests: "
            "lower scheduler.max_num_batched_tokens or scheduler.max_num_seqs, or use a smaller model"
        ) from error
    log.info("a step of %d tokens takes %.2f GiB", sum(lengths), taken / 2**30)
    return taken


def largest_prompts(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int) -> list[int]:
    """Lengths of prompts, longest first, that fill a step as far as the limits let them."""
    num_rows = min(max_num_seqs, max_num_batched_tokens)
    each, more = divmod(max_num_batched_tokens, num_rows)
    return [min(max_model_len, each + (row < more)) for row in range(num_rows)]


def largest_plans(lengths: Sequence[int], max_model_len: int, block_size: int) -> tuple[StepPlan, StepPlan]:
    """A step that computes prompts of `lengths` and one that goes on with each by a token. All share their blocks:
    nobody reads what is written."""
    blocks = tuple(range(num_blocks_for(lengths[0], max_model_len, block_size)))
    prompts, decodes, admissions, edits = [], [], [], []
    for slot, length in enumerate(lengths):
        prompts.append(ScheduledRequest("", slot, 0, length, True, 0))
        decodes.append(ScheduledRequest("", slot, min(length, max_model_len - 1), 1, True, 0))
        admissions.append(Admission(slot, "", (0,) * length, length, SamplingParams(), 0))
        edits.append(BlockTableEdit(slot, 0, blocks))
    return StepPlan(0, tuple(prompts), tuple(admissions), tuple(edits)), StepPlan(1, tuple(decodes))


def num_blocks_for(length: int, max_model_len: int, block_size: int) -> int:
    """Blocks of a sequence of `length` and a token more, if there can be one."""
    return -(-min(length + 1, max_model_len) // block_size)
