"""Models whose layers all have a window: sequences longer than their pool, with transformers' tokens."""

from __future__ import annotations

from typing import Any, cast

import pytest

from llmkit import CacheSpec
from llmkit.llm import LLM
from llmkit.types import SamplingParams
from tests.equality import real_shapes
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
    """The most blocks that any request, and all together, have held.

    With `spoils` blocks that nobody holds are full of NaN: whoever reads one, if only to mask it, gets NaN.
    """

    def __init__(self, llm: LLM, spoils: bool) -> None:
        self.of_one = self.of_all = 0
        planner, executor = llm.engine.planner, cast(Any, llm.engine.executor)
        launch = executor.launch

        def watching(plan: Any) -> Any:
            if spoils:
                unused = sorted(set(range(NUM_BLOCKS)) - planner.allocator.census().keys())
                for pool in executor.backend._pools:
                    pool[:, unused] = float("nan")
            self.of_all = max(self.of_all, planner.allocator.stats().num_used_blocks)
            planner.settle()
            self.of_one = max([self.of_one, *(view.num_blocks for view in planner._running)])
            return launch(plan)

        executor.launch = watching


@pytest.mark.parametrize(
    ("cache", "depth", "max_num_seqs"),
    [("paged", 0, 3), ("paged", 1, 1), ("paged without prefix", 0, 1), ("paged without prefix", 1, 3), ("radix", 1, 3)],
)
def test_sequences_longer_than_the_pool(cache: str, depth: int, max_num_seqs: int, wanted: list[Reference]) -> None:
    """Each of them takes 43 to 71 tokens; the pool has 30, and all three at once want more than that."""
    model, asked = tiny_model("mistral"), prompts(LENGTHS)
    scheduler = scheduler_options("continuous", CHUNK, 8) | {"max_num_seqs": max_num_seqs}
    options: dict[str, Any] = {"scheduler": scheduler, "cache": CACHES[cache], "depth": depth}
    llm = LLM(model, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, fused=False, **options)
    assert llm.engine.planner.allocator.spec == CacheSpec(NUM_BLOCKS, BLOCK_SIZE, WINDOW)
    tap, peaks = Tap(llm), Peaks(llm, spoils=cache == "paged without prefix")
    with ReallyFloat64():
        outputs = llm.generate(asked, PARAMS)
    assert error_of(tap, outputs, wanted) < 1e-9
    # A request's next token sees a window; ahead of it are a chunk and what is in flight.
    bound = -(-(WINDOW + CHUNK * (1 + depth)) // BLOCK_SIZE) + 1
    assert 0 < peaks.of_one <= bound < max(LENGTHS) // BLOCK_SIZE
    assert peaks.of_all <= NUM_BLOCKS
    assert any(output.metrics.num_preemptions for output in outputs) == (max_num_seqs > 1)
    check_nothing_left(llm)


@pytest.mark.parametrize("cache", ["paged", "radix"])
@pytest.mark.parametrize("num_blocks", [30, 24], ids=["roomy", "evicting"])
def test_what_is_released_is_found_again(cache: str, num_blocks: int, wanted: list[Reference]) -> None:
    """The same prompts again, and then with what they brought: the cache goes on from where a window of it is left."""
    model, asked, first = tiny_model("mistral"), prompts(LENGTHS), 30
    llm = LLM(model, cache=cache, block_size=BLOCK_SIZE, num_blocks=num_blocks, depth=1, fused=False)
    longer = [prompt + ref.token_ids[:first] for prompt, ref in zip(asked, wanted, strict=True)]
    num_cached = []
    for wave, start in ((asked, 0), (asked, 0), (longer, first)):
        for prompt, ref in zip(wave, wanted, strict=True):
            params = PARAMS.model_copy(update={"max_tokens": MAX_TOKENS - start})
            with ReallyFloat64():
                (output,) = llm.generate([prompt], params)
            assert list(output.token_ids) == ref.token_ids[start:]
            num_cached.append(output.metrics.num_cached_tokens)
    if num_blocks == 30:
        assert num_cached == [0, 0, 0, 0, 30, 5, 30, 60, 35]
    else:
        assert num_cached == [0, 0, 0, 0, 0, 0, 0, 60, 35], "beginnings are gone, ends are not"
    check_nothing_left(llm)


def test_host_memory_beside_a_pool_smaller_than_a_step(wanted: list[Reference]) -> None:
    """What swapping costs is measured with no more tokens than the pool has slots."""
    cache = {"name": "paged", "prefix": False}
    options: dict[str, Any] = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, "fused": False, "swap_gib": 0.001}
    llm = LLM(tiny_model("mistral"), cache=cache, **options)
    assert llm.engine.planner.host is not None
    with ReallyFloat64():
        outputs = llm.generate(prompts(LENGTHS), PARAMS)
    assert [list(output.token_ids) for output in outputs] == [ref.token_ids for ref in wanted]
    check_nothing_left(llm)


@pytest.mark.cuda
@pytest.mark.parametrize("depth", [0, 1])
def test_a_small_pool_gives_the_tokens_of_a_large_one_on_a_gpu(depth: int) -> None:
    """A window of 48 keys in blocks of 16: prompts of up to 150 tokens and 40 more, in a pool of 1,536 slots or 96."""
    outputs = []
    for num_blocks in (96, 6):
        scheduler = {"name": "continuous", "max_chunk_tokens": 40, "max_num_seqs": 2}
        llm = LLM(
            real_shapes.loaded("mistral", "cuda"),
            scheduler,
            attention="flash",
            block_size=16,
            num_blocks=num_blocks,
            depth=depth,
        )
        outputs.append(llm.generate(real_shapes.prompts(), real_shapes.greedy(40)))
        check_nothing_left(llm)
    for prompt, one, other in zip(real_shapes.prompts(), *outputs, strict=True):
        assert one.error is None and other.error is None
        assert not real_shapes.unexplained("mistral", "cuda", prompt, one.token_ids, other.token_ids)
