"""Decoding that goes on: the same requests run one token each, step after step. Torch-free.

A step then costs what changes in it: requests that fill a block or end are looked at, all others only get their token.
Their counters stand still meanwhile and are brought up to date by `settle`, whenever somebody is going to look at them.
"""

from __future__ import annotations

from array import array
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter

from llmkit.engine.residency import Residency
from llmkit.rows import DecodeRows, Lineup
from llmkit.types import Edits, Request, StepPlan


@dataclass(slots=True, eq=False)
class _Row:
    """A request's part: it runs from position `start` in each of the first `num_steps` steps. How many of the steps
    planned and landed its counters know of."""

    number: int
    request: Request
    start: int
    num_steps: int
    num_planned: int = 0
    num_landed: int = 0


_number = attrgetter("number")
NOTHING: tuple[Edits, tuple[Edits, ...]] = ((), ())
"""No edits, of no group."""


@dataclass(slots=True, eq=False)
class Crew:
    """The requests of one or more successive steps in row order; `is_whole`: none of them has left since."""

    requests: list[Request]
    token_ids: list[list[int]]
    lineup: Lineup
    is_whole: bool = True
    _new_tokens: dict[str, int] | None = None

    def new_tokens(self) -> dict[str, int]:
        """One token for everybody who has not left; the same dictionary for all steps as long as nobody does."""
        if self.is_whole:
            self._new_tokens = self._new_tokens or dict.fromkeys(self.lineup.request_ids, 1)
            return self._new_tokens
        pairs = zip(self.requests, self.lineup.epochs, strict=True)
        return {request.request_id: 1 for request, epoch in pairs if request.epoch == epoch}

    def without(self, gone: set[Request]) -> Crew:
        """A crew of those that stay."""
        stay = [request not in gone for request in self.requests]
        ids, *columns = self.lineup
        lineup = Lineup(tuple(compress(ids, stay)), *(array("q", compress(column, stay)) for column in columns))
        return Crew(list(compress(self.requests, stay)), list(compress(self.token_ids, stay)), lineup)


def is_decoding(request: Request) -> bool:
    """Whether a running request has just one token to run, or none because its last one is on its way.

    One whose blocks the device does not know yet, since the step that was to tell failed, needs a step of its own.
    """
    if request.num_sent_blocks != request.num_blocks:
        return False
    target = request.num_tokens + request.num_pending_samples
    return target == request.num_computed_tokens + request.num_in_flight_tokens + 1 or is_at_full_length(request)


def is_at_full_length(request: Request) -> bool:
    """Whether its last token is on its way."""
    return request.num_tokens + request.num_pending_samples >= request.max_num_tokens


class SteadyDecode:
    """Plans and lands such steps from `first_step_id` on, until a scheduler has to be asked."""

    def __init__(self, requests: Iterable[Request], residency: Residency, first_step_id: int) -> None:
        """`requests` run and are all decoding; their rows come in this order."""
        self.first_step_id = first_step_id
        self._residency = residency
        self._num_planned = 0
        self._num_landed = 0
        self._rows: dict[Request, _Row] = {}
        self._to_grow: defaultdict[int, list[_Row]] = defaultdict(list)
        self._to_publish: defaultdict[int, list[_Row]] = defaultdict(list)
        self._to_stop: defaultdict[int, list[_Row]] = defaultdict(list)
        self._in_flight: deque[Crew] = deque()
        self._gone: set[Request] = set()
        self._crew = self._gather(requests)

    def _gather(self, requests: Iterable[Request]) -> Crew:
        residency = self._residency
        for request in requests:
            num_steps = request.max_num_tokens - request.num_tokens - request.num_pending_samples
            if num_steps > 0:
                start = request.num_computed_tokens + request.num_in_flight_tokens
                row = self._rows[request] = _Row(len(self._rows), request, start, num_steps)
                self._to_stop[num_steps].append(row)
                self._expect_growth(row)
                self._to_publish[residency.block_size - start % residency.block_size].append(row)
        members = list(self._rows)
        lineup = Lineup(
            tuple([request.request_id for request in members]),
            array("q", [request.slot for request in members]),
            array("q", [request.epoch for request in members]),
            array("q", [row.start for row in self._rows.values()]),
        )
        return Crew(members, [request.token_ids for request in members], lineup)

    def _expect_growth(self, row: _Row) -> None:
        """Note the step for which the row needs another block."""
        step = row.request.num_blocks * self._residency.block_size - row.start
        if step < row.num_steps:
            self._to_grow[step].append(row)

    def plan(self) -> StepPlan | None:
        """The next step; None, and then it is over, if blocks are short or nobody has anything left to run."""
        grown = self._grow()
        if grown is None:
            return None
        edits, more_edits = grown
        self._gone.update(row.request for row in self._to_stop.get(self._num_planned, ()))
        if self._gone:
            self._crew, self._gone = self._crew.without(self._gone), set()
        if not self._crew.requests:
            return None
        rows = DecodeRows(self._crew.lineup, self._num_planned)
        step_id = self.first_step_id + self._num_planned
        self._num_planned += 1
        self._residency.num_scheduled_tokens += len(rows)
        self._in_flight.append(self._crew)
        return StepPlan(step_id, rows, (), edits, None, more_edits)

    def _grow(self) -> tuple[Edits, tuple[Edits, ...]] | None:
        """New blocks for those who need one now; None if there are not enough."""
        rows = self._to_grow.pop(self._num_planned, ())
        if not rows:
            return NOTHING
        rows = sorted((row for row in rows if row.request in self._rows), key=_number)
        for row in rows:
            self._settle(row)
            if not self._residency.reserve(row.request, row.start + self._num_planned + 1):
                return None
            self._expect_growth(row)
        edits = tuple([self._residency.edit(row.request) for row in rows])
        more_edits = self._residency.more_edits([row.request for row in rows]) if self._residency.has_groups else ()
        for row in rows:
            row.request.num_sent_blocks = row.request.num_blocks
        return edits, more_edits

    def owns(self, plan: StepPlan) -> bool:
        """Whether `plan` came from here."""
        return plan.step_id >= self.first_step_id

    def land(self, token_ids: Sequence[int]) -> Crew:
        """The oldest step has run: everybody gets a token, but for those who have left since."""
        crew = self._in_flight.popleft()
        self._num_landed += 1
        if crew.is_whole:
            deque(map(list.append, crew.token_ids, token_ids), maxlen=0)
        else:
            for request, epoch, own, token_id in zip(
                crew.requests, crew.lineup.epochs, crew.token_ids, token_ids, strict=True
            ):
                if request.epoch == epoch:
                    own.append(token_id)
        self._publish()
        self._residency.land(self.first_step_id + self._num_landed - 1)
        return crew

    def _publish(self) -> None:
        """The step that has just landed filled a block of these rows: their KV may be reused."""
        rows = self._to_publish.pop(self._num_landed, ())
        for row in sorted((row for row in rows if row.request in self._rows), key=_number):
            self._settle(row)
            self._to_publish[self._num_landed + self._residency.block_size].append(row)

    def full_length(self) -> list[Request]:
        """Those for whom the step that has just landed was the last."""
        return [row.request for row in self._to_stop.get(self._num_landed, ()) if row.request in self._rows]

    def leave(self, request: Request) -> None:
        """`request` is about to end: settle its account; tokens still in flight are not for it."""
        row = self._rows.pop(request, None)
        if row is None:
            return
        self._settle(row)
        if row.num_steps > self._num_planned:
            self._gone.add(request)
        for crew in self._in_flight:
            crew.is_whole = crew.is_whole and request not in crew.requests

    def settle(self) -> None:
        """Bring everybody's counters up to date."""
        for row in self._rows.values():
            self._settle(row)

    def _settle(self, row: _Row) -> None:
        request, num_planned, num_landed = row.request, self._num_planned, self._num_landed
        if num_planned > row.num_steps:
            num_planned, num_landed = row.num_steps, min(num_landed, row.num_steps)
        num_new_planned, num_new_landed = num_planned - row.num_planned, num_landed - row.num_landed
        if num_new_planned:
            row.num_planned = num_planned
            request.num_service_tokens += num_new_planned
            request.last_step_id = self.first_step_id + num_planned - 1
        if num_new_planned != num_new_landed:
            request.num_in_flight_tokens += num_new_planned - num_new_landed
            request.num_pending_samples += num_new_planned - num_new_landed
        if num_new_landed:
            row.num_landed = num_landed
            request.num_tokens += num_new_landed
            request.num_computed_tokens += num_new_landed
            self._residency.publish(request, request.num_computed_tokens)
