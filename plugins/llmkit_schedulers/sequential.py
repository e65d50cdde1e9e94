"""One request at a time, to its end: the baseline that shows what batching brings."""

from typing import ClassVar

from pydantic import Field

from llmkit import ContinuousBatching, ContinuousBatchingSettings, SchedulerSettings


class SequentialSettings(ContinuousBatchingSettings):
    """Options of the sequential scheduler."""

    max_num_seqs: int = Field(1, ge=1, le=1, description="always 1")


class Sequential(ContinuousBatching):
    """The next request starts when the one before has ended."""

    Settings: ClassVar[type[SchedulerSettings]] = SequentialSettings
