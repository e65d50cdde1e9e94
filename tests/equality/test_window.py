"""Models whose layers all have a window: sequences longer than their pool, with transformers' tokens."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit import CacheSpec
from llmkit.llm import LLM
from llmkit.types import SamplingParams
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import BLOCK_SIZE, Reference, Tap, error_of, prompts, reference, scheduler_options
from tests.equality.zoo import WINDOW, tiny_model
from tests.tiny_llm import check_nothing_left

LENGTHS, MAX_TOKENS, CHUNK = (3, 31, WINDOW), 40, 6
NUM_BLOCKS = 6
PARAMS = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
CACHES: dict[str, dict[str, Any]] = {
    "paged": {"name": "paged"},
    "paged without prefix": {"name": "paged", "prefix": False},
    "radix": {"name": "radix"},
}


@pytest.fixture(scope="module")
def wanted() -> list[Reference]:
    plain = tiny_model("mistral").as_transformers()
    with ReallyFloat64():
        return [reference(plain, prompt, MAX_TOKENS) for prompt in prompts(LENGTHS)]


class Peaks:
    """The most blocks that any request, and all together, have held."""

    def __init__(self, llm: LLM) -> None:
        self.of_one = self.of_all = 0
        planner, launch = llm.engine.planner, llm.engine.executor.launch

        def watching(plan: Any) -> Any:
            self.of_all = max(self.of_all, planner.allocator.stats().num_used_blocks)
            planner.settle()
            self.of_one = max([self.of_one, *(view.num_blocks for view in planner._running)])
            return launch(plan)

        llm.engine.executor.launch = watching  # type: ignore[method-assign]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("max_num_seqs", [1, 3], ids=["alone", "crowded"])
def test_sequences_longer_than_the_pool(cache: str, depth: int, max_num_seqs: int, wanted: list[Reference]) -> None:
    """Each of them takes 43 to 71 tokens; the pool has 30, and all three at once want more than that."""
    model, asked = tiny_model("mistral"), prompts(LENGTHS)
    scheduler = scheduler_options("continuous", CHUNK, 8) | {"max_num_seqs": max_num_seqs}
    options: dict[str, Any] = {"scheduler": scheduler, "cache": CACHES[cache], "depth": depth}
    llm = LLM(model, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, fused=False, **options)
    assert llm.engine.planner.allocator.spec == CacheSpec(NUM_BLOCKS, BLOCK_SIZE, WINDOW)
    tap, peaks = Tap(llm), Peaks(llm)
    with ReallyFloat64():
        outputs = llm.generate(asked, PARAMS)
    assert error_of(tap, outputs, wanted) < 1e-9
    # A request's next token sees a window; ahead of it are a chunk and what is in flight.
    bound = -(-(WINDOW + CHUNK * (1 + depth)) // BLOCK_SIZE) + 1
    assert 0 < peaks.of_one <= bound < max(LENGTHS) // BLOCK_SIZE
    assert peaks.of_all <= NUM_BLOCKS
    assert any(output.metrics.num_preemptions for output in outputs) == (max_num_seqs > 1)
    check_nothing_left(llm)
