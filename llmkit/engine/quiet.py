"""Python's garbage collector, kept off the hot path while a batch or a workload runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

FULL_EVERY = 1000
"""A full collection after so many of the middle generation instead of 10: after 7 million new objects that stay."""


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Inside, what existed before is not looked at for garbage, and full collections are rare. Young garbage is
    collected as ever; afterwards everything is as it was.

    With torch and transformers loaded a full collection looks at hundreds of thousands of objects and stops all steps
    for as long as many of them take, and queued requests and their outputs bring it about. Does nothing where objects
    are frozen already, by an outer block or by the application: that is its choice then.
    """
    if gc.get_freeze_count():
        yield
        return
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*thresholds[:2], max(thresholds[2], FULL_EVERY))
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
