"""Plays timed requests on an engine, each at its scheduled arrival on the engine's clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from llmkit.engine.engine import Engine
from llmkit.engine.patience import PatientSteps
from llmkit.engine.progress import Progress as RequestProgress
from llmkit.engine.quiet import quiet_collector
from llmkit.errors import LlmkitError, RequestError
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.report.progress import Progress
from llmkit.types import Completion, Request, SamplingParams
from llmkit.workload.interrupt import Interrupt, deferred_interrupt
from llmkit.workload.protocol import Target
from llmkit.workload.requests import TimedRequest

NAP = 0.1  # longest sleep in one go, so that Ctrl-C is noticed


@dataclass(slots=True)
class Played:
    """What became of the requests, by their index in the workload; a refused one has no completion."""

    completions: dict[int, Completion] = field(default_factory=dict)
    refusals: dict[int, str] = field(default_factory=dict)
    interrupted: bool = False


def run_workload(
    target: Target,
    requests: Sequence[TimedRequest],
    sampling: SamplingParams,
    recorder: MetricsRecorder,
    progress: Progress | None = None,
    seed: int = 0,
) -> Played:
    """Send every request when its arrival has come, and step the engine until all have ended.

    Latencies count from the scheduled arrival, however late the loop gets round to it. A request that the engine
    refuses counts as failed; the others run. Ctrl-C aborts what is left and returns with `interrupted`.
    """
    if target.engine.hooks is not target.plugin_manager.hook:
        raise LlmkitError("the engine does not call the hooks of the target's plugin manager: nothing can be measured")
    player = _Player(target.engine, requests, sampling, recorder, progress, seed)
    with quiet_collector(), _observing(target, recorder), deferred_interrupt() as interrupt:
        recorder.start(target.engine.clock.now())
        try:
            player.play(interrupt)
        except KeyboardInterrupt:
            player.played.interrupted = True
        finally:
            player.abort_rest()
            recorder.stop(target.engine.clock.now())
    return player.played


@contextmanager
def _observing(target: Target, recorder: MetricsRecorder) -> Iterator[None]:
    target.plugin_manager.register(recorder)
    try:
        yield
    finally:
        target.plugin_manager.unregister(recorder)


class _Player:
    """The loop's state: requests still to come, those in the engine, what came out."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[TimedRequest],
        sampling: SamplingParams,
        recorder: MetricsRecorder,
        progress: Progress | None,
        seed: int,
    ) -> None:
        self.engine = engine
        self.played = Played()
        self._recorder = recorder
        self._progress = progress
        params = {length: _params(sampling, length) for length in {timed.max_tokens for timed in requests}}
        built = [(_build(index, timed, params[timed.max_tokens], seed), index) for index, timed in enumerate(requests)]
        self._coming = deque(sorted(built, key=lambda entry: entry[0].arrival_time))
        self._index = {request.request_id: index for request, index in built}
        self._open: set[str] = set()
        self._steps = PatientSteps(engine)
        self._num_shown = 0

    def play(self, interrupt: Interrupt) -> None:
        """Until everything has ended or Ctrl-C."""
        engine, clock = self.engine, self.engine.clock
        self._schedule(clock.now())
        while self._coming or engine.has_unfinished:
            if interrupt.is_requested:
                self.played.interrupted = True
                break
            self._send(clock.now())
            if engine.has_unfinished:
                self._step()
            elif self._coming:
                self._sleep_until(self._coming[0][0].arrival_time)

        self.abort_rest()
        while engine.has_unfinished:  # steps in flight that nobody waits for any more
            engine.step()

    def _schedule(self, start: float) -> None:
        """From seconds since the start to the engine's clock."""
        for request, _ in self._coming:
            request.arrival_time += start
            if request.deadline is not None:
                request.deadline += start

    def _send(self, now: float) -> None:
        while self._coming and self._coming[0][0].arrival_time <= now:
            request, index = self._coming.popleft()
            try:
                ends = RequestProgress(request, self.engine.limits.eos_token_ids, streams=False)
                self.engine.add(request, ends)
                self._open.add(request.request_id)
            except RequestError as error:
                self.played.refusals[index] = str(error)
                self._recorder.refused(request.request_id, request.arrival_time, request.num_prompt_tokens, str(error))

    def _step(self) -> None:
        for output in self._steps.step(others_come=bool(self._coming)):
            if output.completion is not None:
                self._open.discard(output.request_id)
                self.played.completions[self._index[output.request_id]] = output.completion
        if self._progress is not None:
            self._progress.advance(self._recorder.num_new_tokens - self._num_shown)
            self._num_shown = self._recorder.num_new_tokens

    def _sleep_until(self, when: float) -> None:
        clock = self.engine.clock
        before = clock.now()
        clock.sleep_until(min(when, before + NAP))
        self._recorder.slept(clock.now() - before)

    def abort_rest(self) -> None:
        """After an interrupt or a fault: end what is still open, so that it is counted."""
        if self._open:
            self.engine.abort(tuple(self._open))


def _params(sampling: SamplingParams, max_tokens: int) -> SamplingParams:
    """`sampling` for one sample of `max_tokens` tokens."""
    changes = {"n": 1, "max_tokens": max_tokens, "min_tokens": min(sampling.min_tokens, max_tokens)}
    return SamplingParams.model_validate(sampling.model_dump() | changes)


def _build(index: int, timed: TimedRequest, params: SamplingParams, seed: int) -> Request:
    own = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return Request(
        f"w{index}",
        list(timed.prompt_token_ids),
        params,
        timed.arrival_time,
        timed.priority,
        timed.tenant,
        timed.deadline,
        timed.length_hint,
        seed=own if params.seed is None else params.seed,
    )
