"""The rows of a step: one by one, or as columns where the same sequences decode step after step."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload


class ScheduledRequest(NamedTuple):
    """One row of a step: run `num_tokens` tokens of the sequence in `slot`, from position `start`.

    There is no prefill or decode flag: a decode is `num_tokens == 1`. `samples` says that the row ends at the last
    known token (or beyond, see `Executor`), so its last logits choose the next one. `epoch` numbers the request's stay
    in its slot; a result whose epoch is no longer the request's is dropped.
    """

    request_id: str
    slot: int
    start: int
    num_tokens: int
    samples: bool
    epoch: int


class Lineup(NamedTuple):
    """Sequences that decode together, one column each for their ids, slots, epochs and first positions (int64).

    Steps with the same rows share one lineup, so whoever turns a column into something else need do so only once.
    """

    request_ids: tuple[str, ...]
    slots: array[int]
    epochs: array[int]
    starts: array[int]


class DecodeRows(Sequence[ScheduledRequest]):
    """Rows that all run and sample one token: row i stands at position `lineup.starts[i] + shift`.

    Making them costs the same for any number of rows; the single rows are made when somebody looks at them.
    """

    __slots__ = ("_rows", "lineup", "shift")

    def __init__(self, lineup: Lineup, shift: int) -> None:
        self.lineup = lineup
        self.shift = shift
        self._rows: tuple[ScheduledRequest, ...] | None = None

    def __len__(self) -> int:
        return len(self.lineup.slots)

    def __iter__(self) -> Iterator[ScheduledRequest]:
        return iter(self._made())

    @overload
    def __getitem__(self, index: int) -> ScheduledRequest: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[ScheduledRequest, ...]: ...

    def __getitem__(self, index: int | slice) -> ScheduledRequest | tuple[ScheduledRequest, ...]:
        return self._made()[index]

    def _made(self) -> tuple[ScheduledRequest, ...]:
        if self._rows is None:
            shift = self.shift
            self._rows = tuple(
                ScheduledRequest(request_id, slot, start + shift, 1, True, epoch)
                for request_id, slot, epoch, start in zip(*self.lineup, strict=True)
            )
        return self._rows
