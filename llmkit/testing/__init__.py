"""The conformance kit: check a scheduler or a cache of your own against everything the engine relies on.

`machine` additionally needs hypothesis and is imported by name: `from llmkit.testing.machine import cache_machine`.
"""

from llmkit.testing.caches import check_cache
from llmkit.testing.chaos import Chaos
from llmkit.testing.coverage import Coverage
from llmkit.testing.fake import FakeExecutor
from llmkit.testing.grouped import grouped
from llmkit.testing.oracle import OracleExecutor
from llmkit.testing.reference import ReferenceCache, ReservingCache, continuation
from llmkit.testing.schedulers import check_scheduler
from llmkit.testing.tags import next_token

__all__ = [
    "Chaos",
    "Coverage",
    "FakeExecutor",
    "OracleExecutor",
    "ReferenceCache",
    "ReservingCache",
    "check_cache",
    "check_scheduler",
    "continuation",
    "grouped",
    "next_token",
]
