"""The GPU workloads, token for token, all at once. Python's `Random`, because that is how they were published."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from llmkit.workload.requests import TimedRequest

Range = tuple[int, int]


def nano256(seed: int) -> list[TimedRequest]:
    """nano-vllm's published bench: seed 0 gives 256 requests and 133,966 output tokens."""
    rng = Random(seed)
    prompts = [_prompt(rng, (100, 1024)) for _ in range(256)]
    return [TimedRequest(0.0, prompt, rng.randint(100, 1024)) for prompt in prompts]


def _uniform(num_requests: int, prompt_len: Range, max_tokens: Range) -> Callable[[int], list[TimedRequest]]:
    def build(seed: int) -> list[TimedRequest]:
        rng = Random(seed)
        return [TimedRequest(0.0, _prompt(rng, prompt_len), rng.randint(*max_tokens)) for _ in range(num_requests)]

    return build


def _prompt(rng: Random, prompt_len: Range) -> tuple[int, ...]:
    return tuple([rng.randint(0, 10000) for _ in range(rng.randint(*prompt_len))])


WORKLOADS: dict[str, Callable[[int], list[TimedRequest]]] = {
    "nano256": nano256,
    "single": _uniform(1, (128, 128), (256, 256)),
    "batch64": _uniform(64, (512, 512), (256, 256)),
    "mixed512": _uniform(512, (100, 1024), (100, 1024)),
    "prefill": _uniform(32, (8192, 8192), (8, 8)),
}
