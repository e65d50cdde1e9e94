"""Groups what the engine reports per sequence into what the caller asked per prompt. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmkit.engine.progress import Progress, StepOutput
from llmkit.types import Completion, FinishReason, RequestMetrics, RequestOutput


@dataclass(frozen=True, slots=True)
class StreamOutput:
    """An increment of one completion: prompt number, sample number, new tokens and the text they made certain."""

    prompt_index: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    error: str | None = None


@dataclass(slots=True)
class _Expected:
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    progresses: Sequence[Progress]
    completions: dict[int, Completion]


class Collector:
    """The prompts of one call, in order, and what has come back of them; if it `streams`, also piece by piece."""

    def __init__(self, streams: bool = False) -> None:
        self.streams = streams
        self._increments: deque[StreamOutput] = deque()
        self._prompts: list[_Expected] = []
        self._open: dict[str, tuple[int, int]] = {}

    @property
    def is_open(self) -> bool:
        return bool(self._open)

    @property
    def open_ids(self) -> list[str]:
        """Ids of the sequences that have not ended."""
        return list(self._open)

    def expect(self, prompt: str | None, token_ids: tuple[int, ...], progresses: Sequence[Progress]) -> None:
        """The samples of the next prompt have been queued."""
        for progress in progresses:
            self._open[progress.request.request_id] = (len(self._prompts), progress.index)
        self._prompts.append(_Expected(prompt, token_ids, progresses, {}))

    def reject(self, prompt: str | None, token_ids: tuple[int, ...], n: int, error: str, now: float) -> None:
        """The next prompt cannot run."""
        metrics = RequestMetrics(arrival_time=now, finished_time=now)
        completions = {i: Completion(i, "", (), FinishReason.ERROR, None, metrics, error) for i in range(n)}
        if self.streams:
            number = len(self._prompts)
            self._increments.extend(StreamOutput(number, i, (), "", FinishReason.ERROR, error) for i in range(n))
        self._prompts.append(_Expected(prompt, token_ids, (), completions))

    def take(self, output: StepOutput) -> None:
        """Take in one engine output; sequences of other callers are left alone."""
        where = self._open.get(output.request_id)
        if where is None:
            return
        if output.completion is not None:
            del self._open[output.request_id]
            self._prompts[where[0]].completions[where[1]] = output.completion
        if self.streams:
            tokens, text, reason = output.token_ids, output.text, output.finish_reason
            self._increments.append(StreamOutput(*where, tokens, text, reason, output.error))

    def increments(self) -> Iterator[StreamOutput]:
        """What has come and was not handed out yet, oldest first."""
        while self._increments:
            yield self._increments.popleft()

    def outputs(self) -> list[RequestOutput]:
        """One output per prompt, in input order."""
        return [_output(expected) for expected in self._prompts]


def _output(expected: _Expected) -> RequestOutput:
    completions = tuple(completion for _, completion in sorted(expected.completions.items()))
    first = expected.progresses[0] if expected.progresses else None
    wants_logprobs = first is not None and first.request.sampling_params.prompt_logprobs is not None
    logprobs = tuple(first.prompt_logprobs) if first is not None and wants_logprobs else None
    return RequestOutput(expected.prompt, expected.prompt_token_ids, completions, logprobs)
