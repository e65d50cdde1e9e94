"""What forks bring: n samples of one prompt, with blocks copied and without, prefixes cached and not, in one process.

python -m benchmarks.forks
python -m benchmarks.forks --samples 16 --prompt-len 1000 --block-size 16
python -m benchmarks.forks --window 32      # a tiny model, five of whose six layers have that window

All arms share the weights and take turns; every round has a prompt of its own. Prompt tokens computed are those of all
samples together, blocks the most in use at once (where layers have unlike windows, of those that see all).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.sliding_window import tiny
from llmkit import LLM, Registry, SamplingParams, StepEvent, hookimpl
from llmkit.metrics.environment import environment
from llmkit_attention.sdpa import SdpaAttention

MAX_TOKENS = 16


class Uncopied(SdpaAttention):
    """Copies no blocks, so that nothing is forked: samples share what the cache finds."""

    copies_blocks = False


@dataclass(eq=False)
class Arm:
    """An engine, and what its steps had to do."""

    num_tokens: int = 0
    num_blocks: int = 0
    llm: LLM = field(init=False)
    rounds: list[tuple[int, int, float]] = field(default_factory=list)

    @hookimpl
    def llmkit_register(self, registry: Registry) -> None:
        """Add the backend that is compared with."""
        registry.add_attention("uncopied", f"{__name__}:Uncopied")

    @hookimpl
    def llmkit_step_finished(self, event: StepEvent) -> None:
        """Count."""
        self.num_tokens += event.plan.num_tokens
        self.num_blocks = max(self.num_blocks, event.cache.num_used_blocks)

    def run(self, prompt: list[int], samples: int) -> list[tuple[int, ...]]:
        """One round: note prompt tokens computed, most blocks and milliseconds; the tokens of the samples."""
        self.num_tokens = self.num_blocks = 0
        params = SamplingParams(n=samples, max_tokens=MAX_TOKENS, ignore_eos=True, seed=0)
        started = perf_counter()
        (output,) = self.llm.generate([prompt], params)
        milliseconds = 1e3 * (perf_counter() - started)
        self.rounds.append((self.num_tokens - samples * (MAX_TOKENS - 1), self.num_blocks, milliseconds))
        return [sample.token_ids for sample in output.completions]


def compare(model: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All arms in turn, the first round left out; medians."""
    arms = {(forks, prefix): Arm() for forks, prefix in product((False, True), (False, True))}
    for (forks, prefix), arm in arms.items():
        cache, attention = {"name": "paged", "prefix": prefix}, "sdpa" if forks else "uncopied"
        arm.llm = LLM(model, "continuous", cache, attention, plugins=[arm], block_size=options.block_size)
        model = arm.llm.model
    random, num_equal = Random(0), 0
    for _ in range(options.rounds + 1):
        prompt = [random.randrange(1, model.architecture.vocab_size) for _ in range(options.prompt_len)]
        tokens = [arm.run(prompt, options.samples) for arm in arms.values()]
        num_equal += all(one == tokens[0] for one in tokens)
    results: list[dict[str, Any]] = [{"rounds": options.rounds + 1, "rounds_with_equal_outputs": num_equal}]
    for (forks, prefix), arm in arms.items():
        num_tokens, num_blocks, milliseconds = (median(column) for column in zip(*arm.rounds[1:], strict=True))
        numbers = {"prompt_tokens_computed": num_tokens, "most_blocks": num_blocks, "ms": round(milliseconds, 1)}
        results.append({"forks": forks, "cache.prefix": prefix, **numbers})
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result as JSON, one line an arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--window", type=int)
    for name, default in (("prompt-len", 100), ("samples", 8), ("block-size", 64), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    reach = options.prompt_len + MAX_TOKENS
    model = options.model if options.window is None else tiny(options.window, reach, num_layers=6, num_full=1)
    for result in [*compare(model, options), environment("cpu")]:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
