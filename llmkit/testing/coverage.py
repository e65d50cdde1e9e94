"""What walks went through, to see that they were not vacuous."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Coverage:
    """Counts of one walk; sums of several.

    `num_rules` are all that was done and then checked, `num_steps` those of them that were steps of the engine;
    `num_refusals` are requests that could never run and were told so, `num_late` those that a scheduler refused because
    of their deadline.
    """

    num_walks: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_aborts: int = 0
    num_errors: int = 0
    num_refusals: int = 0
    num_cached_tokens: int = 0
    num_late: int = 0
    num_saved_blocks: int = 0
    num_restored_blocks: int = 0
    num_copied_blocks: int = 0
    num_rules: int = 0

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))
