"""An executor without a model: its tokens are a hash of the whole prefix, so any slip in the bookkeeping shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from llmkit.types import StepPlan, StepResult


def next_token(seed: int, prefix: list[int], vocab_size: int) -> int:
    """The token that follows `prefix`: a pure function of seed and content."""
    digest = blake2b(repr((seed, prefix)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % vocab_size


@dataclass(slots=True)
class _Done:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result


@dataclass(slots=True)
class FakeExecutor:
    """Runs plans on host lists: KV is a table (block, offset) -> (position, token), checked on every read."""

    block_size: int
    vocab_size: int = 1000
    num_steps: int = 0
    _tokens: dict[int, list[int]] = field(default_factory=dict)
    _seeds: dict[int, int] = field(default_factory=dict)
    _tables: dict[int, list[int]] = field(default_factory=dict)
    _kv: dict[int, tuple[int, int]] = field(default_factory=dict)

    def launch(self, plan: StepPlan) -> _Done:
        self.num_steps += 1
        for admission in plan.admissions:
            self._tokens[admission.slot] = list(admission.token_ids)
            self._seeds[admission.slot] = admission.seed
            self._tables[admission.slot] = []
        for slot, start, blocks in plan.edits:
            self._tables[slot][start:] = blocks
        for row in plan.scheduled:
            self._write(row.slot, row.start, row.num_tokens)
        tokens = [self._row(row.slot, row.start + row.num_tokens, row.samples) for row in plan.scheduled]
        return _Done(StepResult(plan.step_id, tokens))

    def _where(self, slot: int, position: int) -> int:
        return self._tables[slot][position // self.block_size] * self.block_size + position % self.block_size

    def _write(self, slot: int, start: int, num_tokens: int) -> None:
        tokens = self._tokens[slot]
        for position in range(start, start + num_tokens):
            self._kv[self._where(slot, position)] = (position, tokens[position])

    def _row(self, slot: int, end: int, samples: bool) -> int:
        tokens = self._tokens[slot]
        read = [self._kv.get(self._where(slot, position)) for position in range(end)]
        expected = list(enumerate(tokens[:end]))
        assert read == expected, f"slot {slot} attends to {read}, wants {expected}"
        if not samples:
            return -1
        assert end == len(tokens), f"slot {slot} samples after {end} of {len(tokens)} tokens"
        tokens.append(next_token(self._seeds[slot], tokens, self.vocab_size))
        return tokens[-1]
