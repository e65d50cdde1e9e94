"""A request that has not been sent yet: what is asked, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmkit.errors import ConfigError
from llmkit.types import SamplingParams
from llmkit.workload.protocol import ModelBounds


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request of a workload. `arrival_time` and `deadline` are seconds from the start of the run.

    `priority`: lower runs first. `length_hint`: the caller's guess of the number of output tokens.
    """

    arrival_time: float
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    length_hint: int | None = None


def check_one_sample(name: str, sampling: SamplingParams) -> None:
    """Raise ConfigError if several samples of a prompt are asked for: what is measured is one a request."""
    if sampling.n > 1:
        raise ConfigError(
            f"sampling.n={sampling.n}: workload {name} draws one sample of each prompt; leave it out, or use "
            "LLM.generate with SamplingParams(n=...)"
        )


def check_length(name: str, longest: int, limit: int) -> None:
    """Raise ConfigError if sequences of `longest` tokens do not fit into `limit`."""
    if longest > limit:
        raise ConfigError(
            f"workload {name} needs sequences of {longest} tokens (prompt and output), "
            f"but the model and its cache hold {limit}"
        )


def check_fits(name: str, requests: Sequence[TimedRequest], bounds: ModelBounds) -> None:
    """Raise ConfigError if a request of a generated workload would be refused or cut short by the model."""
    longest = max(len(request.prompt_token_ids) + request.max_tokens for request in requests)
    check_length(name, longest, bounds.max_model_len)
    largest = max(max(request.prompt_token_ids) for request in requests)
    if largest >= bounds.vocab_size:
        raise ConfigError(
            f"workload {name} uses token ids up to {largest}, but the model's vocabulary is [0, {bounds.vocab_size})"
        )
