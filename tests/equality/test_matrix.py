"""Tokens equal to `transformers.generate`, logits within 1e-9, for every architecture, whatever the arrangement."""

from __future__ import annotations

from typing import Any

import pytest

from tests.equality.arrangements import CHOICES, run
from tests.equality.covering import pairwise
from tests.equality.runs import PROMPT_LENS, references
from tests.equality.zoo import ZOO

CASES = sorted(pairwise({"model": list(ZOO), **CHOICES}), key=lambda case: list(ZOO).index(str(case["model"])))


def every_model_with_every_pair() -> list[dict[str, Any]]:
    """For every model, cases in which every two of the other choices meet."""
    return [{"model": model, **case} for seed, model in enumerate(ZOO) for case in pairwise(CHOICES, seed)]


def case_id(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equal_to_transformers(case: dict[str, Any]) -> None:
    run(**case)


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
