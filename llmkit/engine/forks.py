"""Samples of one prompt: whose KV of it can be shared with the others. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmkit.interfaces.cache import CacheAllocator
from llmkit.types import Request, RequestStatus


class Fork(NamedTuple):
    """A waiting request may start on the first `num_tokens` tokens of `parent`."""

    parent: Request
    num_tokens: int


class Forks:
    """Knows the samples of each prompt, as long as they live. If not `is_on`, or if no fork works in one of the
    `groups`, it knows nobody."""

    def __init__(self, groups: Sequence[CacheAllocator], is_on: bool) -> None:
        self.is_on = is_on and all(group.forks for group in groups)
        self._groups = groups
        self._families: dict[Request, dict[Request, None]] = {}  # a sample: all of its prompt, in order

    def add(self, request: Request, other: Request) -> None:
        """`request` has the prompt and the tenant of `other`, which lives."""
        if self.is_on:
            family = self._families.setdefault(other, {other: None})
            family[request] = None
            self._families[request] = family

    def drop(self, request: Request) -> None:
        """`request` has ended."""
        family = self._families.pop(request, None)
        if family is not None:
            del family[request]

    def find(self, request: Request) -> Fork | None:
        """What a waiting request can start on. Its last known token is left, since its logits choose the next one.

        None for one that wants log-probabilities of its prompt: all of it runs.
        """
        family = self._families.get(request)
        is_waiting = request.status is not RequestStatus.RUNNING
        if family is None or not is_waiting or request.sampling_params.prompt_logprobs is not None:
            return None
        num_tokens = min(request.num_prompt_tokens, request.num_tokens - 1)
        for parent in family:
            if is_computed(parent) and self._holds(parent, num_tokens):
                return Fork(parent, num_tokens)
        return None

    def _holds(self, parent: Request, num_tokens: int) -> bool:
        """Whether no group has released a block of `parent` that a query at `num_tokens` sees."""
        groups = self._groups
        return all(group.num_released_blocks(parent) <= group.spec.num_hidden_blocks(num_tokens) for group in groups)


def is_computed(request: Request) -> bool:
    """Whether `request` runs, has KV of its whole prompt, and has landed a row: what it started on is there."""
    return request.num_ready_tokens < request.num_computed_tokens >= request.num_prompt_tokens
