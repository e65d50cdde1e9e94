"""The largest steps there can be, run once in a pool of few blocks: what they take is what the pool has to leave free.

They also load kernels and libraries, so that the first request does not wait for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from llmkit.engine.decode_graph import DecodeGraphs
from llmkit.engine.executor import TorchExecutor
from llmkit.engine.mixed_graph import TOKENS
from llmkit.errors import CapacityError
from llmkit.interfaces.attention import AttentionBackend
from llmkit.interfaces.scheduler import SchedulerSettings
from llmkit.model.loading import LoadedModel
from llmkit.model.memory import Meter
from llmkit.model.network import LayerAttention
from llmkit.model.rehearsal import compile_ahead, rehearse
from llmkit.sampling_params import SamplingParams
from llmkit.types import Admission, BlockTableEdit, ScheduledRequest, StepPlan

log = logging.getLogger(__name__)


class AttentionAlone:
    """Stands for a network that is not there yet: attends in one layer of each kind, to nothing in particular."""

    def __init__(self, model: LoadedModel, backend: AttentionBackend) -> None:
        kinds = {spec: LayerAttention(backend, index) for index, spec in enumerate(backend.requirements.layers)}
        self._layers, self._vocab_size = kinds, model.architecture.vocab_size
        self._tensor: dict[str, Any] = {"dtype": model.dtype, "device": model.device}

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        for spec, attention in self._layers.items():
            heads = spec.num_heads, spec.num_kv_heads, spec.num_kv_heads
            attention(*(torch.empty(len(input_ids), number, spec.head_dim, **self._tensor) for number in heads))
        return torch.empty(len(rows), self._vocab_size, **self._tensor)


def compile_attention(
    make_executor: Callable[[int], TorchExecutor],
    make_graphs: Callable[[TorchExecutor], DecodeGraphs | None] | None,
    limits: SchedulerSettings,
    max_model_len: int,
) -> Callable[[], None]:
    """Begin to compile what steps launch outside the network, on an executor of `AttentionAlone` and its graphs if any;
    returns a function that waits for it. Without room for them nothing is compiled."""
    lengths = largest_prompts(limits.max_num_seqs, limits.max_num_batched_tokens, max_model_len)
    try:
        executor = make_executor(lengths[0])
        graphs = make_graphs(executor) if make_graphs is not None else None
    except torch.OutOfMemoryError:
        return lambda: None
    plans = largest_plans(lengths, max_model_len, executor.inputs.block_size)
    first = graphs.first_steps() if graphs is not None else []
    return compile_ahead(executor.tokens.device, *(partial(executor.launch, plan) for plan in plans), *first)


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
