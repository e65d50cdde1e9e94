"""Shortest job first by the caller's length hint, with a bound on how far anybody falls behind."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

from pydantic import Field

from llmkit import ContinuousBatching, ContinuousBatchingSettings, RequestView, SchedulerSettings, SchedulingStep


class ShortestJobFirstSettings(ContinuousBatchingSettings):
    """Options of shortest job first."""

    seconds_per_token: float = Field(0.1, gt=0.0, description="an expected output token ranks like arriving so late")
    max_seconds: float = Field(10.0, gt=0.0, description="nobody ranks behind who arrives this much later")


class ShortestJobFirst(ContinuousBatching):
    """Few expected output tokens first; who expects many is put back by at most `max_seconds`.

    A request's rank is `arrival_time + min(expected tokens * seconds_per_token, max_seconds)`. It does not change with
    time, so whoever came `max_seconds` later never goes first: nobody starves. Who runs stays, up to the end unless
    blocks run out. Without a hint a request is expected to take all the tokens it may.
    """

    Settings: ClassVar[type[SchedulerSettings]] = ShortestJobFirstSettings

    def rank(self, request: RequestView) -> tuple[float, float]:
        """Sort key, lowest first."""
        assert isinstance(self.settings, ShortestJobFirstSettings)
        expected = request.length_hint or request.max_num_tokens - request.num_prompt_tokens
        delay = min(expected * self.settings.seconds_per_token, self.settings.max_seconds)
        return request.arrival_time + delay, request.arrival_time

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        return sorted(waiting, key=self.rank)

    def victim(self, candidates: Sequence[RequestView], step: SchedulingStep) -> RequestView:
        return max(reversed(candidates), key=self.rank)  # of equals the latest, or they would evict each other in turn

    def may_pass(self, started: RequestView, waiting: RequestView, now: float) -> bool:
        assert isinstance(self.settings, ShortestJobFirstSettings)
        return started.arrival_time - waiting.arrival_time <= self.settings.max_seconds

    def repeats(self, num_waiting: int, num_free_seqs: int) -> bool:
        return super().repeats(num_waiting and num_free_seqs, num_free_seqs)  # nobody is displaced
