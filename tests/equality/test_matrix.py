"""Tokens equal to `transformers.generate`, logits within 1e-9, for every architecture, whatever the arrangement."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.llm import LLM
from tests.equality.covering import pairwise
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import (
    BLOCK_SIZE,
    GREEDY,
    PROMPT_LENS,
    ROOMY,
    SCARCE,
    Interruptions,
    Tap,
    backends,
    error_of,
    fuse_exactly,
    installed,
    prompts,
    references,
    scheduler_options,
)
from tests.equality.zoo import ZOO, tiny_model

UNLIMITED = 0
FACTORS: dict[str, list[Any]] = {
    "model": list(ZOO),
    "scheduler": installed().names("scheduler"),
    "cache": installed().names("cache"),
    "attention": list(backends()),
    "chunk": [1, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, UNLIMITED],
    "budget": [2, 3, BLOCK_SIZE, BLOCK_SIZE + 1, 2048],
    "preemption": ["none", "scarce", "forced"],
    "depth": [0, 1],
    "fused": [False, True],
}
CASES = sorted(pairwise(FACTORS), key=lambda case: FACTORS["model"].index(case["model"]))


def every_model_with_every_pair() -> list[dict[str, Any]]:
    """For every model, cases in which every two of the other choices meet."""
    others = {name: values for name, values in FACTORS.items() if name != "model"}
    return [{"model": model, **case} for seed, model in enumerate(ZOO) for case in pairwise(others, seed)]


def case_id(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equal_to_transformers(case: dict[str, Any]) -> None:
    run(**case)


def run(
    model: str,
    scheduler: str,
    cache: str,
    attention: str,
    chunk: int,
    budget: int,
    preemption: str,
    depth: int,
    fused: bool,
    device: str = "cpu",
) -> Tap:
    """One arrangement against the reference; raises AssertionError if anything differs, is vacuous or leaks."""
    num_blocks = SCARCE if preemption == "scarce" else ROOMY
    loaded = tiny_model(model, device)
    if fused:
        fuse_exactly(loaded, min(loaded.architecture.max_model_len, num_blocks * BLOCK_SIZE))
    if preemption == "forced":
        scheduler += "_interrupted"
    wanted = references(model, device)
    llm = LLM(
        loaded,
        scheduler=scheduler_options(scheduler, chunk, budget),
        cache=cache,
        attention=attention,
        plugins=[Interruptions()],
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        depth=depth,
        fused=fused,
    )
    tap = Tap(llm)
    with ReallyFloat64():
        outputs = llm.generate(prompts(), GREEDY)
    assert error_of(tap, outputs, wanted) < 1e-9
    assert_not_vacuous(tap, min(chunk or budget, budget), preemption)
    assert_nothing_leaked(llm)
    return tap


def assert_not_vacuous(tap: Tap, limit: int, preemption: str) -> None:
    """Prompts really ran in chunks of the asked size, and somebody was really preempted."""
    rows = [row for plan in tap.plans for row in plan.scheduled]
    longest = [row for row in rows if row.request_id == f"{len(PROMPT_LENS) - 1}-0"]
    assert max(row.num_tokens for row in rows) <= limit
    assert sum(row.start < PROMPT_LENS[-1] for row in longest) >= -(-PROMPT_LENS[-1] // limit)
    num_admissions = sum(len(plan.admissions) for plan in tap.plans)
    assert num_admissions > len(PROMPT_LENS) if preemption == "forced" else num_admissions >= len(PROMPT_LENS)


def assert_nothing_leaked(llm: LLM) -> None:
    assert not llm.engine.has_unfinished
    allocator = llm.engine.planner.allocator
    allocator.check()
    assert allocator.stats().num_used_blocks == 0


@pytest.mark.parametrize("model", ZOO)
def test_references_are_not_vacuous(model: str) -> None:
    """Greedy outputs that repeat themselves would hide mistakes."""
    tokens = [token for ref in references(model) for token in ref.token_ids]
    assert len(set(tokens)) >= 12


@pytest.mark.parametrize("scheduler", ["continuous", "priority", "static"])
@pytest.mark.parametrize("depth", [0, 1])
def test_equal_when_blocks_run_out(scheduler: str, depth: int) -> None:
    """Without limits on chunks everybody is admitted at once, and later there is not room for all."""
    tap = run("mistral", scheduler, "paged", "sdpa", 0, 2048, "scarce", depth, fused=False)
    assert sum(len(plan.admissions) for plan in tap.plans) > len(PROMPT_LENS)


@pytest.mark.slow
@pytest.mark.parametrize("case", every_model_with_every_pair(), ids=case_id)
def test_equal_to_transformers_in_more_arrangements(case: dict[str, Any]) -> None:
    run(**case)
