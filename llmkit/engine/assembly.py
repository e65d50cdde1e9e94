"""Puts an engine together from a loaded model and chosen components; every mismatch is refused here, by name."""

from __future__ import annotations

import logging
from typing import Any

import pluggy
import torch

from llmkit.engine.decode_graph import DecodeGraphs
from llmkit.engine.device_timer import DeviceTimer
from llmkit.engine.engine import Engine
from llmkit.engine.executor import TorchExecutor
from llmkit.engine.inputs import InputBuilder
from llmkit.engine.limits import EngineLimits
from llmkit.engine.memory import choose_num_blocks
from llmkit.engine.planner import Planner
from llmkit.engine.settings import EngineSettings
from llmkit.engine.swap_costs import measure_costs
from llmkit.engine.swapping import HostPool
from llmkit.errors import CapacityError, ConfigError
from llmkit.interfaces.attention import AttentionBackend, AttentionRequirements
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.clock import Clock, MonotonicClock
from llmkit.interfaces.scheduler import Scheduler
from llmkit.model.loading import LoadedModel
from llmkit.model.memory import free_bytes
from llmkit.model.network import Network, build_network
from llmkit.model.sampling import Sampler

log = logging.getLogger(__name__)


def requirements_of(model: LoadedModel, block_size: int) -> AttentionRequirements:
    """What `model` on its device asks of an attention backend."""
    dtype = str(model.dtype).removeprefix("torch.")
    return AttentionRequirements(model.device.type, dtype, block_size, tuple(model.architecture.layers.values()))


def window_of(requirements: AttentionRequirements) -> int | None:
    """How many keys a query sees at most in any layer, its own included; None if a layer sees all."""
    windows = [layer.window for layer in requirements.layers]
    known = [window for window in windows if window is not None]
    return max(known) if known and len(known) == len(windows) else None


def build_backend(
    name: str, backend: type[AttentionBackend], settings: Any, model: LoadedModel, block_size: int | None
) -> AttentionBackend:
    """Instantiate a backend, or ConfigError with every reason why it cannot serve this model."""
    requirements = requirements_of(model, block_size or backend.preferred_block_size)
    reasons = backend.check(requirements)
    if reasons:
        raise ConfigError(f"attention {name!r} cannot run model {model.name!r}: {'; '.join(reasons)}")
    return backend(settings, requirements, model.dtype, model.device)


def build_engine(
    model: LoadedModel,
    scheduler: Scheduler,
    cache: tuple[type[CacheAllocator], Any],
    backend: AttentionBackend,
    settings: EngineSettings,
    hooks: pluggy.HookRelay | None = None,
    clock: Clock | None = None,
) -> Engine:
    """Size the cache, build network, sampler and executor, and connect them. `cache`: allocator class and settings."""
    max_num_seqs, block_size = scheduler.settings.max_num_seqs, backend.requirements.block_size
    reach = model.architecture.max_model_len
    if settings.max_model_len is not None:
        if settings.max_model_len > reach:
            raise ConfigError(f"engine.max_model_len={settings.max_model_len}: model {model.name!r} reaches {reach}")
        reach = settings.max_model_len
    num_blocks = _num_blocks(model, backend, settings, max_num_seqs * -(-reach // block_size))
    allocator = cache[0](cache[1], CacheSpec(num_blocks, block_size, window_of(backend.requirements)))
    max_model_len = min(reach, allocator.max_num_tokens or reach)
    backend.allocate(num_blocks)
    eos, device, vocab_size = model.eos_token_ids, model.device, model.architecture.vocab_size
    network = build_network(model, backend, max_model_len, settings.fused)
    inputs = InputBuilder(max_num_seqs, max_model_len, block_size, allocator.spec.window)
    # One slot more than there are requests: rows that only fill a decode graph up live there.
    tokens = torch.zeros(max_num_seqs + 1, max_model_len + 1, dtype=torch.long, device=device)
    sampler = Sampler(vocab_size, max_num_seqs, device, eos)
    graphs = _graphs(network, backend, sampler, tokens, inputs) if settings.graphs and device.type == "cuda" else None
    timer = DeviceTimer(lambda: torch.cuda.Event(enable_timing=True)) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    executor = TorchExecutor(network, backend, sampler, inputs, tokens, graphs, timer)
    bound_by = "the cache" if max_model_len < reach else "the model"
    limits = EngineLimits(vocab_size, max_model_len, eos, bound_by)
    depth = (1 if device.type == "cuda" else 0) if settings.depth == "auto" else settings.depth
    num_tokens = min(scheduler.settings.max_num_batched_tokens, max_model_len, allocator.spec.num_slots)
    host = _host_pool(executor, allocator.spec, settings.swap_gib, num_tokens) if settings.swap_gib else None
    return Engine(Planner(scheduler, allocator, host), executor, limits, clock or MonotonicClock(), hooks, depth)


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
def _graphs(
    network: Network, backend: AttentionBackend, sampler: Sampler, tokens: torch.Tensor, inputs: InputBuilder
) -> DecodeGraphs | None:
    """Captured decode graphs, or None with the reason logged where backend or model cannot be captured."""
    if sampler.on_device is None:
        log.info("without triton decode runs without CUDA graphs")
        return None
    graphs = DecodeGraphs(network, backend, sampler.on_device.choose, tokens, inputs.block_tables)
    if not graphs.is_supported():
        log.info("attention %s runs without CUDA graphs", type(backend).__name__)
        return None
    try:
        graphs.capture()
    except (RuntimeError, AssertionError) as fault:
        log.warning("decode runs without CUDA graphs: %s", str(fault).partition("\n")[0])
        return None
    return graphs


def _num_blocks(model: LoadedModel, backend: AttentionBackend, settings: EngineSettings, useful: int) -> int:
    free = free_bytes(model.device, settings.gpu_memory_utilization)
    budget = free if model.device.type == "cuda" else int(settings.cpu_cache_gib * 2**30)
    return choose_num_blocks(settings.num_blocks, useful, backend.bytes_per_block(), budget, free)
