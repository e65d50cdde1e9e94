"""Options of the engine itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmkit.interfaces.settings import Settings


class EngineSettings(Settings):
    """Options of the engine itself, whatever the plugins."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="type of weights and KV cache; auto: bfloat16 where it is native, else float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if there is one")
    block_size: int | None = Field(
        None, ge=1, le=1024, description="tokens per KV block; null: what suits the attention backend"
    )
    num_blocks: int | None = Field(None, ge=1, le=1 << 24, description="KV blocks; null: as many as memory allows")
    max_model_len: int | None = Field(None, ge=1, le=1 << 22, description="longest sequence; null: the model's own")
    gpu_memory_utilization: float = Field(0.9, gt=0.0, le=1.0, description="share of GPU memory llmkit may use")
    cpu_cache_gib: float = Field(1.0, gt=0.0, le=4096.0, description="KV cache on CPU, GiB, if num_blocks is null")
    swap_gib: float = Field(
        0.0, ge=0.0, le=4096.0, description="host memory, GiB, where preempted requests may wait instead of recomputing"
    )
    depth: Literal["auto", 0, 1] = Field("auto", description="steps in flight while planning; auto: 1 on CUDA, else 0")
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of requests that bring none, and of random weights")
    fused: bool = Field(True, description="fused projections and norms where the model allows")
    compile: bool = Field(False, description="torch's compiler for the layers of models that are not fused")
    graphs: bool = Field(True, description="decode steps as CUDA graphs where the attention backend allows")
