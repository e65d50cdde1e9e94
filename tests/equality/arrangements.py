"""One arrangement: a model under one scheduler, cache and so on, against `transformers.generate`."""

from __future__ import annotations

from typing import Any

from llmkit.llm import LLM
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
    fused_exactly,
    installed,
    prompts,
    references,
    scheduler_options,
)
from tests.equality.zoo import tiny_model

UNLIMITED = 0
CHOICES: dict[str, list[Any]] = {
    "scheduler": installed().names("scheduler"),
    "cache": installed().names("cache"),
    "attention": list(backends()),
    "chunk": [1, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, UNLIMITED],
    "budget": [2, 3, BLOCK_SIZE, BLOCK_SIZE + 1, 2048],
    "preemption": ["none", "scarce", "forced"],
    "depth": [0, 1],
    "fused": [False, True],
}


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
    if preemption == "forced":
        scheduler += "_interrupted"
    wanted = references(model, device)
    with fused_exactly():
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
    tap.error = error_of(tap, outputs, wanted)
    assert tap.error < 1e-9
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
