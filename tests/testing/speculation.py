"""Speculative decoding on nothing but the contracts: an executor that proposes and verifies, and a driver for it.

A row may run past the last token the host knows. What stands there is proposed by the executor, which verifies it in
the same step: it reports the accepted tokens and the one behind them. The driver reserves blocks for all of it ahead,
publishes only what was verified and gives the rest back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.testing import OracleExecutor
from llmkit.testing.ledger import Ledger
from llmkit.testing.tags import extend, sample
from llmkit.types import Admission, BlockTableEdit, Request, ScheduledRequest, StepPlan, StepResult


@dataclass(slots=True)
class _Verified:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class SpeculativeOracle(OracleExecutor):
    """The oracle, with proposals: each is right with probability `hit_rate`, drawn from `seed`."""

    def __init__(self, spec: CacheSpec, max_num_seqs: int, max_model_len: int, hit_rate: float, seed: int) -> None:
        super().__init__(spec.block_size, max_num_seqs, max_model_len, vocab_size=5, window=spec.window)
        self.hit_rate, self.random = hit_rate, Random(seed)
        self.num_proposed = self.num_accepted = 0
        self.num_wanted: dict[int, int] = {}

    def launch(self, plan: StepPlan) -> Any:
        """Propose what rows ask for beyond their known tokens, run the step as any other, then verify."""
        entering = {admission.slot: len(admission.token_ids) for admission in plan.admissions}
        slots = [row.slot for row in plan.scheduled]
        known = {slot: entering[slot] if slot in entering else len(self.slots[slot].tags) for slot in slots}
        self.num_wanted = {row.slot: max(0, row.start + row.num_tokens - known[row.slot]) for row in plan.scheduled}
        super().launch(plan).wait()
        new = [self._verify(row, known[row.slot]) if row.samples else [-1] for row in plan.scheduled]
        more = {index: tuple(tokens[1:]) for index, tokens in enumerate(new) if len(tokens) > 1}
        return _Verified(StepResult(plan.step_id, [tokens[0] for tokens in new], more_token_ids=more))

    def _check(self, row: ScheduledRequest) -> int:
        """Before the row is looked at, its proposals become tokens of the sequence like any other."""
        stay = self.slots[row.slot]
        for _ in range(self.num_wanted[row.slot]):
            digest, position = stay.tags[-1]
            token = sample(stay.seed, digest, self.vocab_size)
            if self.random.random() >= self.hit_rate:
                token = (token + 1) % self.vocab_size
            stay.tags.append((extend(digest, token), position + 1))
        return super()._check(row)

    def _verify(self, row: ScheduledRequest, num_known: int) -> list[int]:
        """Accept proposals as long as each is what the tokens before it call for; what is behind them is forgotten."""
        stay, end = self.slots[row.slot], row.start + row.num_tokens
        self.num_proposed += end - num_known
        new: list[int] = []
        for position in range(num_known, end + 1):
            digest = stay.tags[position - 1][0]
            new.append(sample(stay.seed, digest, self.vocab_size))
            wanted = (extend(digest, new[-1]), position)
            if stay.tags[position] != wanted:
                stay.tags[position:] = [wanted]
                break
        self.num_accepted += len(new) - 1
        stay.next_start = num_known + len(new) - 1
        return new


@dataclass(slots=True)
class Speculator:
    """Serves requests to their full length, up to `max_num_seqs` at once, with `num_proposed` tokens ahead.

    The cache is under audit. Every `preempt_every` steps the oldest request is taken out and computed again later.
    """

    cache: CacheAllocator
    executor: SpeculativeOracle
    num_proposed: int
    chunk: int = 5
    preempt_every: int = 4
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    num_steps: int = 0
    num_preemptions: int = 0
    num_cached: int = 0
    num_given_back: int = 0
    num_released: int = 0
    ledger: Ledger = field(init=False)
    _edits: list[BlockTableEdit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.cache)

    def serve(self, requests: list[Request]) -> None:
        """Run until every request has its full length."""
        self.waiting += requests
        while self.waiting or self.running:
            self.step()
            assert self.num_steps < 5000, "no end"

    def step(self) -> None:
        """Preempt, admit, reserve ahead, launch, take in."""
        self.num_steps += 1
        if self.num_steps % self.preempt_every == 0 and len(self.running) > 1:
            self._preempt(self.running[0])
        self._edits, rows = [], {}
        for request in list(self.running):
            if request in self.running and (row := self._row(request)):
                rows[request] = row
        admissions = self._admit(rows)
        rows = {request: row for request, row in rows.items() if request in self.running}
        slots = {request.slot for request in rows}
        edits = tuple(edit for edit in self._edits if edit.slot in slots)
        plan = StepPlan(self.num_steps, tuple(rows.values()), tuple(admissions), edits)
        result = self.executor.launch(plan).wait()
        for index, (request, row) in enumerate(rows.items()):
            new = (result.token_ids[index], *result.more_token_ids.get(index, ())) if row.samples else ()
            self._take_in(request, row, new)

    def _row(self, request: Request) -> ScheduledRequest | None:
        """The next tokens, and proposals behind the last known one; fewer or none of those if blocks are short."""
        start = request.num_computed_tokens
        num_tokens = min(self.chunk, request.num_tokens - start)
        samples = start + num_tokens == request.num_tokens
        most = min(self.num_proposed, request.max_num_tokens - 1 - request.num_tokens) if samples else 0
        for num_ahead in range(most, -1, -1):
            if self._reserve(request, start + num_tokens + num_ahead):
                num_tokens += num_ahead
                return ScheduledRequest(request.request_id, request.slot, start, num_tokens, samples, 1)
        victim = self.running[-1]
        self._preempt(victim)
        return self._row(request) if victim is not request else None

    def _reserve(self, request: Request, upto: int) -> bool:
        if not self.ledger.allocate(request, upto):
            return False
        table = self.cache.block_table(request)
        if len(table) > request.num_sent_blocks:
            first = max(request.num_sent_blocks, self.cache.num_released_blocks(request))
            self._edits.append(BlockTableEdit(request.slot, first, tuple(table[first:])))
            request.num_sent_blocks = len(table)
        return True

    def _admit(self, rows: dict[Request, ScheduledRequest]) -> list[Admission]:
        """Who fits with what is known of it beside the others."""
        admissions = []
        free = set(range(self.executor.max_num_seqs)) - {request.slot for request in self.running}
        while self.waiting and free:
            request = self.waiting[0]
            request.slot, num_cached = min(free), self.ledger.match(request)
            if not self._reserve(request, min(num_cached + self.chunk, request.num_tokens)):
                break
            free.remove(request.slot)
            request.num_computed_tokens = num_cached
            self.num_cached += num_cached
            self.running.append(self.waiting.pop(0))
            admissions.append(
                Admission(request.slot, request.request_id, tuple(request.token_ids), request.num_prompt_tokens,
                          request.sampling_params, request.seed)
            )  # fmt: skip
            num_tokens = min(self.chunk, request.num_tokens - num_cached)
            samples = num_cached + num_tokens == request.num_tokens
            rows[request] = ScheduledRequest(request.request_id, request.slot, num_cached, num_tokens, samples, 1)
        return admissions

    def _take_in(self, request: Request, row: ScheduledRequest, new: tuple[int, ...]) -> None:
        """Append what was accepted, publish what was verified, give back blocks that hold only what was rejected."""
        request.token_ids += new
        request.num_tokens = len(request.token_ids)
        request.num_computed_tokens = request.num_tokens - 1 if row.samples else row.start + row.num_tokens
        num_blocks = len(self.cache.block_table(request))
        self.ledger.commit(request, request.num_computed_tokens)
        self.ledger.truncate(request, request.num_computed_tokens)
        request.num_sent_blocks = len(self.cache.block_table(request))
        self.num_given_back += num_blocks - request.num_sent_blocks
        self.num_released = max(self.num_released, self.cache.num_released_blocks(request))
        if request.num_tokens >= request.max_num_tokens:
            self.running.remove(request)
            self.ledger.free(request)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.ledger.free(request)
        request.slot, request.num_computed_tokens, request.num_sent_blocks = -1, 0, 0
        self.num_preemptions += 1
        self.waiting.insert(0, request)
