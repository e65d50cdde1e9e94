"""The test oracle: an executor without a model, as strict about memory as a device is careless.

Every KV slot stores a tag: the hash of the tokens it stands for, and its position. Rows write and read where the real
input packing (`llmkit.engine.inputs`) points, block tables grow by the real edits and are never cleared, and every
query must find exactly the tags of its own prefix. The next token is a hash of what was read. No torch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmkit.engine.inputs import InputBuilder
from llmkit.testing.tags import Tag, extend, sample, tags_of
from llmkit.types import BlockCopies, ScheduledRequest, StepPlan, StepResult


@dataclass(slots=True)
class _Stay:
    """What the token table knows of one stay in a slot: a tag for each token; where its next row must start.

    `table` is its block table as it was when it was last edited.
    """

    request_id: str
    seed: int
    tags: list[Tag]
    table: list[int] = field(default_factory=list)
    next_start: int | None = None


@dataclass(slots=True, eq=False)
class _Row:
    """Where a row's queries stand, where their keys go, and the blocks where keys from `first` up to `end` are read:
    the first of `table` holds the first key that any of the queries sees."""

    stay: _Stay
    slot: int
    start: int
    end: int
    writes: list[int]
    table: list[int]
    first: int
    has_failed: bool = False


@dataclass(slots=True, eq=False)
class _Pending:
    executor: OracleExecutor
    number: int
    rows: list[_Row]
    result: StepResult

    def wait(self) -> StepResult:
        """The result; checks that later launches left alone whatever this step named."""
        self.executor.num_results += 1
        self.executor.land(self.number)
        if self.executor.num_steps > self.number:
            for row in self.rows:
                assert self.executor.slots[row.slot] is row.stay, f"slot {row.slot} was handed over while in flight"
                if not row.has_failed:
                    self.executor.read(row)
        return self.result


@dataclass(slots=True)
class OracleExecutor:
    """Runs plans on host lists for up to `max_num_seqs` sequences of up to `max_model_len` tokens.

    With `packs` every step goes through `InputBuilder.build`; without, rows use its block tables only, which is
    faster. `faults` maps request ids to the length from which on their rows fail, each with an error of its own; such
    a row writes nothing, so whoever reads its slots is found. With a `window` a row reads what its queries see, and
    nothing before.
    """

    block_size: int
    max_num_seqs: int
    max_model_len: int
    vocab_size: int = 2
    faults: Mapping[str, int] = field(default_factory=dict)
    packs: bool = True
    window: int | None = None
    num_steps: int = 0
    num_results: int = 0
    history: deque[StepPlan] = field(default_factory=lambda: deque(maxlen=6))
    in_flight: deque[_Pending] = field(default_factory=deque)
    slots: dict[int, _Stay] = field(default_factory=dict)
    inputs: InputBuilder = field(init=False)
    num_saved_blocks: int = 0
    num_restored_blocks: int = 0
    num_copied_blocks: int = 0
    _kv: defaultdict[int, list[Tag | None]] = field(init=False)
    _host: dict[int, list[Tag | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kv = defaultdict(lambda: [None] * self.block_size)
        self.inputs = InputBuilder(self.max_num_seqs, self.max_model_len, self.block_size, self.window)

    def launch(self, plan: StepPlan) -> _Pending:
        """Run `plan` at once; AssertionError if a query reads a tag that is not of its own prefix."""
        self.num_steps += 1
        self.history.append(plan)
        for slot, request_id, token_ids, _, _, seed in plan.admissions:
            self.slots[slot] = _Stay(request_id, seed, tags_of(token_ids))
        if plan.edits:
            self._edit(plan)
        if plan.copies is not None:
            self._copy(plan.copies)
        scheduled = tuple(plan.scheduled)
        for one in scheduled:
            self._check(one)
        slots = {one.slot for one in scheduled}
        assert len(slots) == len(scheduled), f"slots {slots}: one has two rows in a step"
        rows = self._packed(plan) if self.packs else [self._plain(one) for one in scheduled]
        errors = self._errors(plan) if self.faults else {}
        for at in errors:
            rows[at].has_failed = True
        for row in rows:
            self._write(row)
        tokens = [self._sample(row) for row in rows]
        pending = _Pending(self, self.num_steps, rows, StepResult(plan.step_id, tokens, errors=errors))
        self.in_flight.append(pending)
        return pending

    def _edit(self, plan: StepPlan) -> None:
        """Block tables grow where they end."""
        for slot, start, blocks in plan.edits:
            num_blocks = len(self.slots[slot].table)
            is_next = start <= num_blocks or (self.window is not None and not num_blocks)
            assert is_next, f"slot {slot}: its table has {num_blocks} blocks, edited at {start}"
            assert not blocks or min(blocks) >= 0, f"slot {slot}: {blocks} are not all blocks"
        self.inputs.apply(plan)
        for slot, start, blocks in plan.edits:
            self.slots[slot].table = self.inputs.block_tables[slot, : start + len(blocks)].tolist()

    def _copy(self, copies: BlockCopies) -> None:
        """What is copied must be there, and nobody in flight may read where it goes."""
        for block, host_block in copies.saves:
            self._host[host_block] = list(self._kv[block])
        found = [self._kv[source][:num_tokens] for source, _, num_tokens in copies.forks]
        for (source, block, num_tokens), entries in zip(copies.forks, found, strict=True):
            assert num_tokens and None not in entries, f"{entries} of block {source} are copied to {block}"
            self._kv[block] = entries + [None] * (self.block_size - num_tokens)
        for host_block, block in copies.restores:
            self._kv[block] = list(self._host[host_block])
        self.num_saved_blocks += len(copies.saves)
        self.num_restored_blocks += len(copies.restores)
        self.num_copied_blocks += len(copies.forks)
        written = {block for _, block in copies.restores} | {copy.block for copy in copies.forks}
        num_written = len(copies.restores) + len(copies.forks)
        assert len(written) == num_written, f"a block is restored or copied to twice: {copies}"
        for pending in self.in_flight:
            for other in pending.rows:
                both = written.intersection(other.table)
                assert not both, f"{both} are copied to, which {other.stay.request_id!r} reads in flight"

    def land(self, number: int) -> None:
        """Launch `number` and those before it have landed: nobody reads their blocks any more."""
        while self.in_flight and self.in_flight[0].number <= number:
            self.in_flight.popleft()

    def _check(self, row: ScheduledRequest) -> None:
        """What a row says agrees with what its slot holds."""
        name, slot, start, num_tokens, samples, _ = row
        end, stay = start + num_tokens, self.slots.get(slot)
        assert stay is not None, f"{name!r} runs in slot {slot}, which nobody has entered"
        assert end <= self.max_model_len, f"{name!r} runs to {end}, beyond {self.max_model_len}"
        assert stay.request_id == name, f"slot {slot} is not the slot of {name!r}"
        assert num_tokens > 0, f"slot {slot}: a row of {num_tokens} tokens"
        is_next = start == stay.next_start or stay.next_start is None
        assert is_next, f"{name!r} has {stay.next_start} entries, a row starts at {start}"
        num_known, reach = len(stay.tags), len(stay.table) * self.block_size
        assert end <= num_known, f"{name!r} runs to {end}, but knows {num_known} tokens"
        assert end <= reach, f"{name!r} writes up to {end}, but its blocks reach {reach}"
        assert samples == (end == num_known), f"{name!r}: samples={samples} after {end} of {num_known} tokens"
        stay.next_start = end

    def _plain(self, row: ScheduledRequest) -> _Row:
        """A row as `InputBuilder.build` would pack it."""
        _, slot, start, num_tokens, _, _ = row
        end, size, stay = start + num_tokens, self.block_size, self.slots[slot]
        first, table = self._first_key(start), stay.table
        writes = [table[position // size] * size + position % size for position in range(start, end)]
        return _Row(stay, slot, start, end, writes, table[first // size : -(-end // size)], first)

    def _first_key(self, start: int) -> int:
        """The first position that a query at `start` sees, or one behind it."""
        return 0 if self.window is None else max(0, start - self.window + 1)

    def _packed(self, plan: StepPlan) -> list[_Row]:
        """The rows, read back from the packed arrays only."""
        packed = self.inputs.build(plan)
        first, tables = packed.query_start_loc.tolist(), packed.block_table.tolist()
        positions, owners = packed.positions.tolist(), packed.token_slots.tolist()
        writes, lengths = packed.slot_mapping.tolist(), packed.seq_lens.tolist()
        rows = []
        for index, slot in enumerate(packed.row_slots.tolist()):
            mine = slice(first[index], first[index + 1])
            start, end = positions[mine.start], lengths[index]
            assert positions[mine] == list(range(start, end)), f"slot {slot}: positions {positions[mine]} up to {end}"
            assert owners[mine] == [slot] * (end - start), f"slot {slot}: tokens of slots {owners[mine]}"
            num_blocks = -(-end // self.block_size)
            key = self._first_key(start)
            num_hidden = key // self.block_size
            own, rest = tables[index][num_hidden:num_blocks], tables[index][:num_hidden] + tables[index][num_blocks:]
            assert rest == own[:1] * len(rest), f"slot {slot}: reads {rest} before or behind its blocks {own}"
            rows.append(_Row(self.slots[slot], slot, start, end, writes[mine], own, key))
        fresh = [at // self.block_size for at in writes if not at % self.block_size]
        assert packed.fresh_blocks.tolist() == fresh, f"fresh blocks {packed.fresh_blocks}, the step begins {fresh}"
        lasts = [first[row + 1] - 1 for row in packed.sampling_rows]
        assert packed.logit_tokens.tolist() == lasts, f"logits of tokens {packed.logit_tokens}, wants {lasts}"
        wanted = [row.samples for row in plan.scheduled]
        assert list(packed.sampling_rows) == [at for at, samples in enumerate(wanted) if samples], "wrong rows sample"
        assert [row.start for row in rows] == [row.start for row in plan.scheduled], "rows start elsewhere"
        return rows

    def _write(self, row: _Row) -> None:
        size, kv, stay = self.block_size, self._kv, row.stay
        tags: list[Tag] | list[None] = stay.tags[row.start : row.end]
        for at, tag in zip(row.writes, [None] * len(tags) if row.has_failed else tags, strict=True):
            block, offset = at // size, at % size
            if not offset:
                kv[block] = [None] * size
            kv[block][offset] = tag
        if not self.in_flight:
            return
        written = {at // size for at in row.writes}
        for pending in self.in_flight:
            for other in pending.rows:
                if other.stay is not stay and not written.isdisjoint(other.table):
                    both = written.intersection(other.table)
                    raise AssertionError(
                        f"{stay.request_id!r} writes {both}, which {other.stay.request_id!r} reads in flight"
                    )

    def read(self, row: _Row) -> list[Tag | None]:
        """The entries from `first` to `end` that the row's table leads to; AssertionError if they are not its own."""
        first, end, tags = row.first, row.end, row.stay.tags
        skipped, wanted = first % self.block_size, tags[first:end] if first or end < len(tags) else tags
        found = self.entries(row.table, skipped + end - first)
        if skipped:
            del found[:skipped]
        if found != wanted:
            wrong = next(
                (at for at, (is_, tag) in enumerate(zip(found, wanted, strict=False)) if is_ != tag), len(found)
            )
            name, block = row.stay.request_id, row.table[(skipped + wrong) // self.block_size]
            raise AssertionError(f"{name!r} reads a wrong KV entry at position {row.first + wrong}, block {block}")
        return found

    def entries(self, table: Sequence[int], end: int) -> list[Tag | None]:
        """What stands in the first `end` KV slots of a block table; None where nothing was written."""
        kv = self._kv
        found: list[Tag | None] = []
        for block in table:
            found += kv[block]
        del found[end:]
        return found

    def _sample(self, row: _Row) -> int:
        """The token behind a row; -1 if it does not end at the last known one."""
        stay, end = row.stay, row.end
        last = stay.tags[end - 1] if row.has_failed else self.read(row)[-1]
        if end < len(stay.tags) or last is None:
            return -1
        digest, _ = last
        token = sample(stay.seed, digest, self.vocab_size)
        stay.tags.append((extend(digest, token), end))
        return token

    def _errors(self, plan: StepPlan) -> dict[int, str]:
        """Rows that fail by order of `faults`."""
        return {
            index: f"fault injected at {self.faults[name]} tokens"
            for index, (name, _, start, num_tokens, _, _) in enumerate(plan.scheduled)
            if name in self.faults and start + num_tokens >= self.faults[name]
        }
