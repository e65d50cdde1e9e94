"""Last come, first served: good for the newest caller, kept fair by a limit on patience."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

from pydantic import Field

from llmkit import ContinuousBatching, ContinuousBatchingSettings, Registry, RequestView, SchedulerSettings, hookimpl


class LifoSettings(ContinuousBatchingSettings):
    """Options of the LIFO scheduler."""

    patience: float = Field(30.0, gt=0.0, description="seconds after which a request is not overtaken any more")


class Lifo(ContinuousBatching):
    """The newest request first; those that waited longer than `patience` before all others, oldest first."""

    Settings: ClassVar[type[SchedulerSettings]] = LifoSettings

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        assert isinstance(self.settings, LifoSettings)
        overdue = now - self.settings.patience
        tired = sorted((r for r in waiting if r.arrival_time <= overdue), key=lambda r: r.arrival_time)
        fresh = sorted((r for r in waiting if r.arrival_time > overdue), key=lambda r: -r.arrival_time)
        return [*tired, *fresh]


@hookimpl
def llmkit_register(registry: Registry) -> None:
    registry.add_scheduler("lifo", Lifo)
