"""What releasing blocks behind a window brings: the same requests in the same pool, with and without, on a CPU.

python benchmarks/sliding_window.py
python benchmarks/sliding_window.py --window 64 --num-blocks 128

The model is tiny and random; every layer has the window. All requests arrive at once. All numbers but the seconds are
the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch

from llmkit import LLM, CacheSpec, Registry, SamplingParams, StepEvent, hookimpl
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec
from llmkit_caches.paged import PagedCache, PagedSettings

BLOCK_SIZE, VOCAB_SIZE = 16, 97


class Holding(PagedCache):
    """Knows of no window, so it holds every block to the end."""

    def __init__(self, settings: PagedSettings, spec: CacheSpec) -> None:
        super().__init__(settings, replace(spec, window=None))


class Watch:
    """Adds `holding` to the caches and counts what every step has."""

    def __init__(self) -> None:
        self.num_running: list[int] = []
        self.num_used_blocks: list[int] = []

    @hookimpl(trylast=True)
    def llmkit_register(self, registry: Registry) -> None:
        registry.add_cache("holding", Holding)

    @hookimpl
    def llmkit_step_finished(self, event: StepEvent) -> None:
        self.num_running.append(event.num_running)
        self.num_used_blocks.append(event.cache.num_used_blocks)


def tiny(window: int, max_model_len: int) -> LoadedModel:
    """A random model of two layers, each with the window."""
    config = {
        "model_type": "mistral",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": max_model_len,
        "sliding_window": window,
    }
    return load_model(ModelSpec("tiny", config=config, seed=1), torch.float32, torch.device("cpu"))


def measure(cache: str, model: LoadedModel, options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """One run: its numbers, and what was generated."""
    watch, random = Watch(), Random(0)
    scheduler = {"name": "continuous", "max_num_seqs": options.num_requests, "max_num_batched_tokens": options.budget}
    llm = LLM(model, scheduler, cache, block_size=BLOCK_SIZE, num_blocks=options.num_blocks, plugins=[watch])
    prompts = [[random.randrange(VOCAB_SIZE) for _ in range(options.prompt_len)] for _ in range(options.num_requests)]
    params = SamplingParams(max_tokens=options.output_len, temperature=0.0, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    metrics = [output.metrics for output in outputs]
    return {
        "cache": cache,
        "steps": len(watch.num_running),
        "mean_running": round(sum(watch.num_running) / len(watch.num_running), 1),
        "most_running": max(watch.num_running),
        "most_used_blocks": max(watch.num_used_blocks),
        "preemptions": sum(one.num_preemptions for one in metrics),
        "recomputed_tokens": sum(one.num_recomputed_tokens for one in metrics),
        "seconds": round(max(one.e2el for one in metrics if one.e2el is not None), 2),
    }, [output.token_ids for output in outputs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result as JSON, one line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=64)
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=192)
    parser.add_argument("--budget", type=int, default=64, help="most tokens in a step")
    options = parser.parse_args(arguments)
    model = tiny(options.window, options.prompt_len + options.output_len)
    results, tokens = zip(*(measure(cache, model, options) for cache in ("holding", "paged")), strict=True)
    for result in results:
        print(json.dumps(result))
    print(json.dumps({"equal_outputs": tokens[0] == tokens[1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
