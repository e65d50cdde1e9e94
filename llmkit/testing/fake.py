"""An executor without a model: its tokens depend on the whole prefix, so any slip in the bookkeeping shows.

It is stricter than a device: whatever a step named must still stand, untouched, when its result is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmkit.testing.tags import digests_of, extend, sample
from llmkit.types import StepPlan, StepResult


@dataclass(slots=True)
class _Slot:
    """What the device knows of one stay: digests of all its prefixes, its block table, where its next row starts."""

    request_id: str
    seed: int
    digests: list[int]
    table: list[int] = field(default_factory=list)
    num_entries: int | None = None


@dataclass(slots=True)
class _Pending:
    executor: FakeExecutor
    number: int
    slots: dict[int, tuple[_Slot, int, int]]
    result: StepResult

    def wait(self) -> StepResult:
        """The result; checks that later launches left alone whatever this step named."""
        self.executor.num_results += 1
        if self.executor.num_steps > self.number:
            for number, (slot, first, end) in self.slots.items():
                assert self.executor.slots.get(number) is slot, f"slot {number} was handed over while in flight"
                self.executor.read(slot, first, end)
        return self.result


@dataclass(slots=True)
class FakeExecutor:
    """Runs plans on host lists. A KV entry is the digest of its prefix, and every row checks all entries it reads.

    `faults` maps request ids to the length from which on their rows fail, each with an error of its own. With
    a `window` a row reads what its queries see.
    """

    block_size: int
    vocab_size: int = 1000
    faults: Mapping[str, int] = field(default_factory=dict)
    window: int | None = None
    num_steps: int = 0
    num_results: int = 0
    history: deque[StepPlan] = field(default_factory=lambda: deque(maxlen=6))
    slots: dict[int, _Slot] = field(default_factory=dict)
    _kv: dict[int, list[int]] = field(default_factory=dict)
    _host: dict[int, list[int]] = field(default_factory=dict)

    def launch(self, plan: StepPlan) -> _Pending:
        """Run `plan` at once; AssertionError if it reads an entry that was never written or belongs to another."""
        self.num_steps += 1
        self.history.append(plan)
        for slot, request_id, token_ids, _, _, seed in plan.admissions:
            self.slots[slot] = _Slot(request_id, seed, digests_of(token_ids))
        for slot, start, blocks in plan.edits:
            table = self.slots[slot].table
            if self.window is not None and not table:
                table += [-1] * start  # what nobody sees
            assert start <= len(table), f"slot {slot}: its table has {len(table)} blocks, an edit starts at {start}"
            table[start:] = blocks
        if plan.copies is not None:
            for block, host_block in plan.copies.saves:
                self._host[host_block] = list(self._kv.get(block, ()))
            found = [(copy, self._kv[copy.source][: copy.num_tokens]) for copy in plan.copies.forks]
            for copy, entries in found:
                self._kv[copy.block] = entries + [0] * (self.block_size - len(entries))
            for host_block, block in plan.copies.restores:
                self._kv[block] = list(self._host[host_block])
        named: dict[int, tuple[_Slot, int, int]] = {}
        for request_id, slot, start, num_tokens, _, _ in plan.scheduled:
            assert slot not in named, f"slot {slot} has two rows in one step"
            assert self.slots[slot].request_id == request_id, f"slot {slot} is not the slot of {request_id!r}"
            assert num_tokens > 0, f"slot {slot}: a row of {num_tokens} tokens"
            self._write(self.slots[slot], start, start + num_tokens)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            named[slot] = self.slots[slot], first, start + num_tokens
        tokens = [self._row(*named[row.slot], row.samples) for row in plan.scheduled]
        errors = {
            index: f"fault injected at {self.faults[row.request_id]} tokens"
            for index, row in enumerate(plan.scheduled)
            if row.start + row.num_tokens >= self.faults.get(row.request_id, 1 << 60)
        }
        return _Pending(self, self.num_steps, named, StepResult(plan.step_id, tokens, errors=errors))

    def _write(self, slot: _Slot, start: int, end: int) -> None:
        known = slot.num_entries
        assert start == known or known is None, f"{slot.request_id!r} has {known} entries, a row starts at {start}"
        assert end <= len(slot.digests), f"{slot.request_id!r} runs to {end}, but knows {len(slot.digests)} tokens"
        reach = len(slot.table) * self.block_size
        assert end <= reach, f"{slot.request_id!r} writes up to {end}, but its blocks reach {reach}"
        for position in range(start, end):
            index, offset = divmod(position, self.block_size)
            block = self._kv.setdefault(slot.table[index], [0] * self.block_size)
            block[offset] = slot.digests[position]
        slot.num_entries = end

    def read(self, slot: _Slot, first: int, end: int) -> None:
        """Check the KV entries of `slot` from `first` to `end`."""
        skipped, wanted = first % self.block_size, slot.digests[first:end]
        blocks = slot.table[first // self.block_size : -(-end // self.block_size)]
        entries = [entry for block in blocks for entry in self._kv.get(block, ())][skipped : skipped + end - first]
        if entries != wanted:
            pairs = enumerate(zip(entries, wanted, strict=False), first)
            wrong = next((at for at, (is_, right) in pairs if is_ != right), first + len(entries))
            block = slot.table[wrong // self.block_size]
            raise AssertionError(f"{slot.request_id!r} reads a wrong KV entry at position {wrong}, block {block}")

    def _row(self, slot: _Slot, first: int, end: int, samples: bool) -> int:
        self.read(slot, first, end)
        is_last = end == len(slot.digests)
        assert samples == is_last, f"{slot.request_id!r}: samples={samples} after {end} of {len(slot.digests)} tokens"
        if not samples:
            return -1
        token = sample(slot.seed, slot.digests[-1], self.vocab_size)
        slot.digests.append(extend(slot.digests[-1], token))
        return token
