"""What releasing blocks behind a window brings: the same requests in the same pool, with and without, on a CPU.

python benchmarks/sliding_window.py
python benchmarks/sliding_window.py --window 64 --num-blocks 128
python benchmarks/sliding_window.py --num-layers 6 --num-full 1     # five with a window and one without, as Gemma 3

The model is tiny and random. Its last `--num-full` layers see everything, the others have the window; `--num-blocks` is
the memory, in blocks of all layers. All requests arrive at once. All numbers but the seconds are the same on every
machine. Where there are layers of both kinds, numbers of blocks are lists: full layers, windowed ones.
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

from llmkit import LLM, CacheSpec, Registry, Request, SamplingParams, StepEvent, hookimpl
from llmkit.engine.grouped_cache import groups_of
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec
from llmkit_caches.paged import PagedCache, PagedSettings

BLOCK_SIZE, VOCAB_SIZE = 16, 97


class Counting(PagedCache):
    """Remembers how many blocks were in use at most."""

    most_used = 0

    def allocate(self, request: Request, upto: int) -> bool:
        is_granted = super().allocate(request, upto)
        self.most_used = max(self.most_used, self.stats().num_used_blocks)
        return is_granted

    def allocate_within(self, request: Request, upto: int, most: int) -> bool:
        is_granted = super().allocate_within(request, upto, most)
        self.most_used = max(self.most_used, self.stats().num_used_blocks)
        return is_granted


class Holding(Counting):
    """Knows of no window, so it holds every block to the end."""

    is_groupable = False

    def __init__(self, settings: PagedSettings, spec: CacheSpec) -> None:
        super().__init__(settings, replace(spec, window=None))


class Watch:
    """Adds both caches and counts what every step has."""

    def __init__(self) -> None:
        self.num_running: list[int] = []

    @hookimpl(trylast=True)
    def llmkit_register(self, registry: Registry) -> None:
        registry.add_cache("holding", Holding)
        registry.add_cache("releasing", Counting)

    @hookimpl
    def llmkit_step_finished(self, event: StepEvent) -> None:
        self.num_running.append(event.num_running)


def tiny(window: int, max_model_len: int, num_layers: int, num_full: int) -> LoadedModel:
    """A random model; all layers but the last `num_full` have the window."""
    kinds = ["sliding_attention"] * (num_layers - num_full) + ["full_attention"] * num_full
    config = {
        **({"model_type": "gemma2", "layer_types": kinds} if num_full else {"model_type": "mistral"}),
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
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
    choice = {"name": cache, "prefix": not options.no_prefix}
    llm = LLM(model, scheduler, choice, block_size=BLOCK_SIZE, num_blocks=options.num_blocks, plugins=[watch])
    groups: Any = groups_of(llm.engine.planner.allocator)
    prompts = [[random.randrange(VOCAB_SIZE) for _ in range(options.prompt_len)] for _ in range(options.num_requests)]
    params = SamplingParams(max_tokens=options.output_len, temperature=0.0, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    metrics = [output.metrics for output in outputs]
    return {
        "cache": cache,
        "blocks": _plain([group.spec.num_blocks for group in groups]),
        "steps": len(watch.num_running),
        "mean_running": round(sum(watch.num_running) / len(watch.num_running), 1),
        "most_running": max(watch.num_running),
        "most_used_blocks": _plain([group.most_used for group in groups]),
        "preemptions": sum(one.num_preemptions for one in metrics),
        "recomputed_tokens": sum(one.num_recomputed_tokens for one in metrics),
        "seconds": round(max(one.e2el for one in metrics if one.e2el is not None), 2),
    }, [output.token_ids for output in outputs]


def _plain(numbers: list[int]) -> int | list[int]:
    """One number where there is one group of layers."""
    return numbers if len(numbers) > 1 else numbers[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result as JSON, one line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=64)
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=192)
    parser.add_argument("--budget", type=int, default=64, help="most tokens in a step")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-full", type=int, default=0, help="layers without a window")
    parser.add_argument("--no-prefix", action="store_true", help="keep nothing for other requests")
    options = parser.parse_args(arguments)
    model = tiny(options.window, options.prompt_len + options.output_len, options.num_layers, options.num_full)
    results, tokens = zip(*(measure(cache, model, options) for cache in ("holding", "releasing")), strict=True)
    for result in results:
        print(json.dumps(result))
    print(json.dumps({"equal_outputs": tokens[0] == tokens[1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
