"""Continuous batching, first come first served: the mechanism of `ContinuousBatching` with its default choices."""

from llmkit import ContinuousBatching


class Continuous(ContinuousBatching):
    """FCFS with chunked prefill in mixed batches; the latest admitted is preempted when blocks run out."""
