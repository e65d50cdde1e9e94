"""What prefix caching brings: many requests that share a long prompt, with `cache.prefix` on and off, in one process.

python benchmarks/prefix_caching.py
python benchmarks/prefix_caching.py --num-requests 16 --prompt-len 512 --rounds 5

Both arms share the weights and take turns. Every round has a shared prompt of its own that no cache has seen, so the
first requests of a round compute it in either arm. All requests of a round arrive at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from statistics import mean, median
from typing import Any

from llmkit import LLM, SamplingParams
from llmkit.metrics.environment import environment

TAIL_LEN, MAX_TOKENS = 16, 8


@dataclass(frozen=True)
class Arm:
    """One round of one arm. Seconds; `hit_rate` is the share of prompt tokens that were in the cache."""

    ttft: float
    duration: float
    hit_rate: float
    token_ids: list[tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """What a round asks."""

    num_requests: int
    prompt_len: int


def prompts_of(seed: int, shape: Shape, vocab_size: int) -> list[list[int]]:
    """A beginning of `prompt_len` random tokens, shared, and `TAIL_LEN` of its own for each request."""
    random = Random(seed)

    def draw(length: int) -> list[int]:
        return [random.randrange(1, vocab_size) for _ in range(length)]

    stem = draw(shape.prompt_len)
    return [stem + draw(TAIL_LEN) for _ in range(shape.num_requests)]


def measure(llm: LLM, prompts: Sequence[Sequence[int]]) -> Arm:
    """Run one round."""
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = llm.generate(list(prompts), params)
    metrics = [output.metrics for output in outputs]
    num_cached = sum(one.num_cached_tokens for one in metrics)
    return Arm(
        mean(one.ttft for one in metrics if one.ttft is not None),
        max(one.e2el for one in metrics if one.e2el is not None),
        num_cached / sum(map(len, prompts)),
        [output.token_ids for output in outputs],
    )


def compare(model: str, shape: Shape, rounds: int) -> dict[str, Any]:
    """Alternate the arms for `rounds` rounds; medians over rounds, ratios within rounds."""
    options = {"name": "continuous", "max_num_seqs": shape.num_requests}
    off = LLM(model, options, {"name": "paged", "prefix": False})
    on = LLM(off.model, options, {"name": "paged", "prefix": True})
    vocab_size = off.engine.limits.vocab_size
    for llm in (off, on):
        measure(llm, prompts_of(-1, Shape(2, shape.prompt_len), vocab_size))
    pairs = []
    for seed in range(rounds):
        prompts = prompts_of(seed, shape, vocab_size)
        pairs.append((measure(off, prompts), measure(on, prompts)))
    equal = [a == b for one, two in pairs for a, b in zip(one.token_ids, two.token_ids, strict=True)]
    return {
        **asdict(shape),
        "rounds": rounds,
        "mean_ttft_off_s": median(one.ttft for one, _ in pairs),
        "mean_ttft_on_s": median(two.ttft for _, two in pairs),
        "ttft_ratio": median(one.ttft / two.ttft for one, two in pairs),
        "ttft_ratios": [one.ttft / two.ttft for one, two in pairs],
        "duration_ratio": median(one.duration / two.duration for one, two in pairs),
        "hit_rate": median(two.hit_rate for _, two in pairs),
        "equal_outputs": mean(equal),
        "environment": environment("cpu"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    for name in ("num_requests", "prompt_len", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    shape = Shape(options.num_requests, options.prompt_len)
    print(json.dumps(compare(options.model, shape, options.rounds), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
