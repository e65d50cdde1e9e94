"""What a plugin or a request raises must not cut short what concerns others. Torch-free."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def one_line(fault: BaseException | None) -> str:
    """Type and first line of what was raised."""
    reason = str(fault).strip().partition("\n")[0]
    return f"{type(fault).__name__}{': ' if reason else ''}{reason}"


class Containment:
    """Puts off what cannot be answered by ending one request, until the step has been taken in."""

    def __init__(self) -> None:
        self._kept: BaseException | None = None

    def take(self, fault: BaseException, what: str) -> str:
        """One line about a fault that ends at most one request. Interrupts are kept; broken invariants go up."""
        if isinstance(fault, AssertionError):
            raise fault
        message = f"{what} failed: {one_line(fault)}"
        if isinstance(fault, Exception):
            log.error(message, exc_info=fault)
        else:
            self.keep(fault)
        return message

    def keep(self, fault: BaseException) -> None:
        """The caller shall hear of `fault`, of the first if there are several, when the step has been taken in."""
        if self._kept is None:
            self._kept = fault
        else:
            log.error("a second fault in one step: %s", one_line(fault), exc_info=fault)

    def release(self) -> None:
        """Raise what was kept."""
        kept, self._kept = self._kept, None
        if kept is not None:
            raise kept
