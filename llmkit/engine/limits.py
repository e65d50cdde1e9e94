"""What a request must respect on this engine, checked when it is added. Torch-free."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmkit.errors import RequestError
from llmkit.types import Request


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds of the loaded model and cache. `max_model_len` is the smaller of the model's and the cache's reach."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    bound_by: str = "the model"


def check_request(request: Request, limits: EngineLimits) -> None:
    """Raise RequestError, in one line, if `request` could never run."""
    num_prompt = request.num_prompt_tokens
    if not num_prompt:
        raise RequestError("the prompt is empty")
    if num_prompt >= limits.max_model_len:
        raise RequestError(
            f"the prompt has {num_prompt} tokens, but {limits.bound_by} holds {limits.max_model_len} "
            "with at least one to generate"
        )
    if not _lie_within(request.token_ids, limits.vocab_size):
        _check_ids("prompt", request.token_ids, limits.vocab_size)
    params = request.sampling_params
    _check_ids("logit_bias", params.logit_bias, limits.vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), limits.vocab_size)
    _check_ids("bad_token_ids", params.bad_token_ids, limits.vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, limits.vocab_size)


def _lie_within(token_ids: Sequence[int], vocab_size: int) -> bool:
    import numpy as np  # not at the top: help and errors of the command come without it

    try:
        ids = np.frombuffer(array("q", token_ids), np.int64)  # numpy alone would take "7" and 7.5
    except OverflowError:
        return False
    except TypeError as error:
        raise RequestError(f"token ids of a prompt are integers: {error}") from None
    return bool(ids.min() >= 0 and ids.max() < vocab_size)


def _check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"token id {token_id} in {name} is outside the vocabulary [0, {vocab_size})")
