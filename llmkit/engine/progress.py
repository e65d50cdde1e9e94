"""What one request has produced so far: tokens, text, stop checks, times. Torch-free."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from llmkit.types import Completion, FinishReason, Request, RequestMetrics, TokenLogprobs


class Detokenizer(Protocol):
    """Turns tokens into text piece by piece; holds back bytes that are not yet valid UTF-8."""

    def step(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class StepOutput(NamedTuple):
    """What a step added to one request. `finish_reason` is set on the last one."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    error: str | None = None
    completion: Completion | None = None


class Progress:
    """Collects a request's output and decides when it ends."""

    def __init__(
        self,
        request: Request,
        eos_token_ids: frozenset[int],
        detokenizer: Detokenizer | None = None,
        index: int = 0,
        streams: bool = True,
    ) -> None:
        """`streams`: somebody wants what every step brings; else there is one output, at the end."""
        params = request.sampling_params
        self.request = request
        self.index = index
        self.streams = streams
        self.text = ""
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._logprobs: list[TokenLogprobs] = []
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_token_ids)
        self._detokenizer = detokenizer
        self._stop = params.stop if detokenizer is not None else ()
        self._is_cut = False
        self._holdback = max((len(stop) - 1 for stop in self._stop), default=0)
        self._num_emitted_chars = 0
        self._num_emitted_tokens = 0
        self._first_token_time: float | None = None
        self._finished_time: float | None = None

    @property
    def heeds_every_token(self) -> bool:
        """Whether `heed` has something to do for every token, not only for stop tokens and the last one."""
        wants_logprobs = self.request.sampling_params.logprobs is not None
        return self.streams or wants_logprobs or self._detokenizer is not None

    def add_token(self, token_id: int, logprobs: TokenLogprobs | None, now: float) -> FinishReason | None:
        """Append a sampled token; the reason to stop, if there is one."""
        self.request.token_ids.append(token_id)
        self.request.num_tokens += 1
        if self._first_token_time is None:
            self._first_token_time = now
        return self.heed(token_id, logprobs)

    def heed(self, token_id: int, logprobs: TokenLogprobs | None) -> FinishReason | None:
        """`token_id` has been appended: the reason to stop, if there is one."""
        request, num_tokens = self.request, len(self.request.token_ids)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        is_free_to_stop = num_tokens - request.num_prompt_tokens >= request.sampling_params.min_tokens
        if token_id in self.stop_ids and is_free_to_stop:
            return FinishReason.STOP
        if self._detokenizer is not None:
            num_old_chars = len(self.text)
            self.text += self._detokenizer.step(token_id)
            if self._stop and is_free_to_stop and self._cut_at_stop_string(num_old_chars):
                return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= request.max_num_tokens else None

    def _cut_at_stop_string(self, num_old_chars: int) -> bool:
        """Cut the text at a stop string that ends in the new part; older ones came before `min_tokens`."""
        starts = ((stop, max(0, num_old_chars - len(stop) + 1)) for stop in self._stop)
        ends = [at for stop, start in starts if (at := self.text.find(stop, start)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
        self._is_cut = bool(ends)
        return self._is_cut

    def add_prompt_logprobs(self, start: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Log-probabilities of the prompt tokens after position `start`; recomputed ones replace the first."""
        self.prompt_logprobs[start:] = logprobs

    def give_up_text(self) -> None:
        """The detokenizer has failed: the text ends here."""
        self._detokenizer = None

    def take_output(self) -> StepOutput:
        """What is new since the last call; text that may turn out to be a stop string is held back."""
        request = self.request
        tokens = tuple(request.token_ids[request.num_prompt_tokens + self._num_emitted_tokens :])
        self._num_emitted_tokens += len(tokens)
        if not self.text:
            return StepOutput(request.request_id, tokens, "")
        end = max(self._num_emitted_chars, len(self.text) - self._holdback)
        text, self._num_emitted_chars = self.text[self._num_emitted_chars : end], end
        return StepOutput(request.request_id, tokens, text)

    def finish(self, reason: FinishReason, error: str | None, now: float) -> StepOutput:
        """The last output, with the whole completion."""
        self._finished_time = now
        if self._detokenizer is not None and not self._is_cut:
            self.text += self._detokenizer.flush()
        self._holdback = 0
        output = self.take_output()
        return output._replace(finish_reason=reason, error=error, completion=self._completion(reason, error))

    def _completion(self, reason: FinishReason, error: str | None) -> Completion:
        wants_logprobs = self.request.sampling_params.logprobs is not None
        logprobs = tuple(self._logprobs) if wants_logprobs else None
        token_ids = tuple(self.request.output_token_ids)
        return Completion(self.index, self.text, token_ids, reason, logprobs, self.metrics(), error)

    def metrics(self) -> RequestMetrics:
        """Times and counts of this request so far."""
        request = self.request
        return RequestMetrics(
            request.arrival_time,
            self._first_token_time,
            self._finished_time,
            request.num_preemptions,
            request.num_cached_tokens,
            request.num_recomputed_tokens,
        )
