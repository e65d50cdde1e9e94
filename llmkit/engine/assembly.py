"""Puts an engine together from a loaded model and chosen components; every mismatch is refused here, by name."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pluggy
import torch

from llmkit.engine.decode_graph import DecodeGraphs
from llmkit.engine.device_timer import DeviceTimer
from llmkit.engine.engine import Engine
from llmkit.engine.executor import TorchExecutor
from llmkit.engine.grouped_attention import backends_of
from llmkit.engine.inputs import InputBuilder
from llmkit.engine.limits import EngineLimits
from llmkit.engine.memory import choose_num_blocks
from llmkit.engine.planner import Planner
from llmkit.engine.pools import allocate_pools, build_allocator, grouped, windows_of
from llmkit.engine.settings import EngineSettings
from llmkit.engine.swap_costs import measure_costs
from llmkit.engine.swapping import HostPool
from llmkit.engine.trial import AttentionAlone, bytes_of_largest_steps, compile_attention, num_blocks_for
from llmkit.errors import CapacityError, ConfigError
from llmkit.interfaces.attention import AttentionBackend
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.clock import Clock, MonotonicClock
from llmkit.interfaces.scheduler import Scheduler, SchedulerSettings
from llmkit.model.loading import DescribedModel, LoadedModel
from llmkit.model.memory import free_bytes, meter_of
from llmkit.model.network import Network, build_network
from llmkit.model.sampling import Sampler

log = logging.getLogger(__name__)


def check_settings(model: DescribedModel, settings: EngineSettings) -> None:
    """ConfigError or CapacityError for what this model, or this machine, cannot give."""
    reach, free = model.architecture.max_model_len, free_bytes(torch.device("cpu"), 1.0)
    if settings.max_model_len is not None and settings.max_model_len > reach:
        raise ConfigError(f"engine.max_model_len={settings.max_model_len}: model {model.name!r} reaches {reach}")
    if settings.swap_gib * 2**30 > free:
        raise CapacityError(f"engine.swap_gib={settings.swap_gib}: {free / 2**30:.2f} GiB of host memory are free")


def build_engine(
    model: LoadedModel,
    scheduler: Scheduler,
    cache: tuple[type[CacheAllocator], Any],
    backend: AttentionBackend,
    settings: EngineSettings,
    hooks: pluggy.HookRelay | None = None,
    clock: Clock | None = None,
) -> Engine:
    """Size the cache, build network, sampler and executor, and connect them. `cache`: allocator class and settings.

    Where a device's memory can be metered the cache gets what the largest steps leave of it.
    """
    limits, device, reach = scheduler.settings, model.device, _reach(model, settings)
    backend = grouped(backend, reach) if cache[0].is_groupable and not settings.swap_gib else backend
    depth = (1 if device.type == "cuda" else 0) if settings.depth == "auto" else settings.depth
    allocator = _allocator(cache, model, backend, settings, limits, reach, depth)
    max_model_len = min(reach, allocator.max_num_tokens or reach)
    meter, on_trial = meter_of(device), partial(_on_trial, model, backend, limits.max_num_seqs, max_model_len)
    if meter is not None:
        attention = partial(on_trial, AttentionAlone(model, backend))
        make_graphs = _graphs if settings.graphs else None
        has_compiled = compile_attention(attention, make_graphs, limits, max_model_len)
    network = build_network(model, backend, max_model_len, settings.fused, settings.compile)
    if meter is not None:
        has_compiled()
        taken = bytes_of_largest_steps(partial(on_trial, network), limits, max_model_len, meter)
        allocator = _allocator(cache, model, backend, settings, limits, reach, depth, taken)
        max_model_len = min(reach, allocator.max_num_tokens or reach)
    allocate_pools(backend, allocator)
    executor = _executor(model, network, backend, limits.max_num_seqs, max_model_len)
    if device.type == "cuda":
        executor.timer = DeviceTimer(lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        executor.graphs = _captured(executor) if settings.graphs else None
    bound_by = "the cache" if max_model_len < reach else "the model"
    engine_limits = EngineLimits(model.architecture.vocab_size, max_model_len, model.eos_token_ids, bound_by)
    num_tokens = min(limits.max_num_batched_tokens, max_model_len, allocator.spec.num_slots)
    host = _host_pool(executor, allocator.spec, settings.swap_gib, num_tokens) if settings.swap_gib else None
    planner = Planner(scheduler, allocator, host, all(one.copies_blocks for one in backends_of(backend)))
    return Engine(planner, executor, engine_limits, clock or MonotonicClock(), hooks, depth)


def _reach(model: LoadedModel, settings: EngineSettings) -> int:
    """The longest sequence, as far as the model goes and the user asks."""
    return settings.max_model_len or model.architecture.max_model_len


def _allocator(
    cache: tuple[type[CacheAllocator], Any],
    model: LoadedModel,
    backend: AttentionBackend,
    settings: EngineSettings,
    limits: SchedulerSettings,
    reach: int,
    depth: int,
    taken: int = 0,
) -> CacheAllocator:
    """An allocator for as many blocks as fit beside the `taken` bytes of a step, and are of use."""
    block_size = backend.requirements.block_size
    free = max(0, free_bytes(model.device, settings.gpu_memory_utilization) - taken)
    budget = free if model.device.type == "cuda" else int(settings.cpu_cache_gib * 2**30)
    useful = limits.max_num_seqs * -(-reach // block_size)
    num_blocks = choose_num_blocks(settings.num_blocks, useful, backend.bytes_per_block(), budget, free)
    return build_allocator(cache, backend, num_blocks, useful, limits, depth)


def _executor(
    model: LoadedModel, network: Network, backend: AttentionBackend, max_num_seqs: int, max_model_len: int
) -> TorchExecutor:
    block_size = backend.requirements.block_size
    builders = [InputBuilder(max_num_seqs, max_model_len, block_size, window) for window in windows_of(backend)]
    # One slot more than there are requests: rows that only fill a decode graph up live there.
    tokens = torch.zeros(max_num_seqs + 1, max_model_len + 1, dtype=torch.long, device=model.device)
    sampler = Sampler(model.architecture.vocab_size, max_num_seqs, model.device, model.eos_token_ids)
    return TorchExecutor(network, backend, sampler, builders[0], tokens, more_inputs=builders[1:])


def _on_trial(
    model: LoadedModel, backend: AttentionBackend, max_num_seqs: int, max_model_len: int, network: Network, length: int
) -> TorchExecutor:
    """An executor over a pool with room for one sequence of `length`."""
    backend.allocate(num_blocks_for(length, max_model_len, backend.requirements.block_size))
    return _executor(model, network, backend, max_num_seqs, max_model_len)


def _host_pool(executor: TorchExecutor, spec: CacheSpec, gib: float, num_tokens: int) -> HostPool:
    """Host memory for blocks; what using it costs is measured with prompts of `num_tokens`."""
    backend = executor.backend
    num_blocks = int(gib * 2**30) // backend.bytes_per_block()
    if not num_blocks:
        raise CapacityError(f"engine.swap_gib={gib}: one block takes {backend.bytes_per_block() / 2**20:.1f} MiB")
    free = free_bytes(torch.device("cpu"), 1.0)
    if num_blocks * backend.bytes_per_block() > free:
        raise CapacityError(f"engine.swap_gib={gib}: {free / 2**30:.2f} GiB of host memory are free")
    if not backend.allocate_host(num_blocks):
        raise ConfigError(f"engine.swap_gib={gib}: attention {type(backend).__name__} copies nothing to the host")
    costs = measure_costs(executor, num_tokens, min(num_blocks, spec.num_blocks))
    return HostPool(num_blocks, spec.block_size, costs)


@torch.inference_mode()
def _captured(executor: TorchExecutor) -> DecodeGraphs | None:
    """Graphs of the first steps, or None with the reason logged where they cannot be captured."""
    graphs = _graphs(executor)
    if graphs is None:
        what = f"attention {type(executor.backend).__name__}" if executor.sampler.on_device else "without triton decode"
        log.info("%s runs without CUDA graphs", what)
        return None
    try:
        graphs.capture()
    except (RuntimeError, AssertionError) as fault:
        log.warning("decode runs without CUDA graphs: %s", str(fault).partition("\n")[0])
        return None
    return graphs


def _graphs(executor: TorchExecutor) -> DecodeGraphs | None:
    """Graphs that are still to be captured, where backend and sampler let them be."""
    backend, on_device = executor.backend, executor.sampler.on_device
    if on_device is None:
        return None
    tables = [inputs.block_tables for inputs in (executor.inputs, *executor.more_inputs)]
    graphs = DecodeGraphs(executor.network, backend, on_device.choose, executor.tokens, tables[0], tables[1:])
    return graphs if graphs.is_supported() else None
