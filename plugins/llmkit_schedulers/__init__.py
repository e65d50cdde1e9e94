"""Built-in schedulers; registered by an entry point like anyone else's."""

from llmkit import Registry, hookimpl
from llmkit_schedulers.continuous import Continuous
from llmkit_schedulers.deadline import Deadline
from llmkit_schedulers.fair import Fair
from llmkit_schedulers.prefix_aware import PrefixAware
from llmkit_schedulers.priority import Priority
from llmkit_schedulers.sequential import Sequential
from llmkit_schedulers.sjf import ShortestJobFirst
from llmkit_schedulers.static import Static


@hookimpl
def llmkit_register(registry: Registry) -> None:
    registry.add_scheduler("sequential", Sequential)
    registry.add_scheduler("static", Static)
    registry.add_scheduler("continuous", Continuous)
    registry.add_scheduler("priority", Priority)
    registry.add_scheduler("sjf", ShortestJobFirst)
    registry.add_scheduler("fair", Fair)
    registry.add_scheduler("deadline", Deadline)
    registry.add_scheduler("prefix_aware", PrefixAware)
