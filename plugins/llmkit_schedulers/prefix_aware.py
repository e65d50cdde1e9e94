"""Longest cached prefix first, with a bound on how long anybody is passed over."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

from pydantic import Field

from llmkit import ContinuousBatching, ContinuousBatchingSettings, RequestView, SchedulerSettings


class PrefixAwareSettings(ContinuousBatchingSettings):
    """Options of the prefix-aware scheduler."""

    max_wait_seconds: float = Field(5.0, ge=0.0, description="whoever waited longer goes first, in order of arrival")
    lookahead: int = Field(128, ge=1, le=4096, description="so many waiting requests are looked up in each step")


class PrefixAware(ContinuousBatching):
    """Among those that wait, whoever has most of its prompt in the cache goes first; others by arrival.

    So requests that begin alike run one after the other, while what they share is still cached, instead of computing it
    again each time others have pushed it out. Nobody is passed over for longer than `max_wait_seconds`.
    """

    Settings: ClassVar[type[SchedulerSettings]] = PrefixAwareSettings

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        assert isinstance(self.settings, PrefixAwareSettings)
        lookahead, latest = self.settings.lookahead, now - self.settings.max_wait_seconds
        seen = waiting[:lookahead]
        yield from (request for request in seen if request.arrival_time < latest)
        fresh = [request for request in seen if request.arrival_time >= latest]
        yield from sorted(fresh, key=lambda request: -request.num_cached_tokens)
        yield from waiting[lookahead:]

    def may_pass(self, started: RequestView, waiting: RequestView, now: float) -> bool:
        assert isinstance(self.settings, PrefixAwareSettings)
        latest = now - self.settings.max_wait_seconds
        return started.arrival_time < latest or waiting.arrival_time >= latest

    def repeats(self, num_waiting: int, num_free_seqs: int) -> bool:
        return super().repeats(num_waiting and num_free_seqs, num_free_seqs)  # nobody is displaced
