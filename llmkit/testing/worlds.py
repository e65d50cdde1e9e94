"""Small random situations for the kit: tiny pools, awkward limits, requests that come, go and come back.

A world is a pure function of its seed. The pools are so small that blocks run out in most of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from llmkit.engine.limits import EngineLimits
from llmkit.interfaces.cache import CacheSpec
from llmkit.types import Request, SamplingParams

VOCAB_SIZE = 50
EOS = frozenset({7, 11})


@dataclass(frozen=True, slots=True)
class Event:
    """At step `at` the caller adds `request`, or aborts `request_id` if there is none."""

    at: int
    request_id: str
    request: Request | None = None


@dataclass(frozen=True, slots=True)
class World:
    """Everything a walk depends on except the components under test. `faults` is for `FakeExecutor`."""

    seed: int
    spec: CacheSpec
    scheduler_options: dict[str, int]
    events: list[Event]
    faults: dict[str, int] = field(default_factory=dict)

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(VOCAB_SIZE, self.spec.num_slots, EOS)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.scheduler_options.items())
        return f"{self.spec.num_blocks} blocks of {self.spec.block_size}, {options}, {len(self.events)} events"


def draw_world(seed: int) -> World:
    """The world of that seed."""
    random = Random(seed)
    spec = CacheSpec(random.randint(4, 24), random.choice((1, 2, 3, 4, 8)))
    options = {
        "max_num_seqs": random.randint(1, 8),
        "max_num_batched_tokens": random.randint(1, 30),
        "max_chunk_tokens": random.choice((0, 1, 3, spec.block_size)),
    }
    events: list[Event] = []
    faults: dict[str, int] = {}
    for number in range(random.randint(1, 12)):
        request_id = str(number)
        at = random.choice((0, 0, random.randint(0, 40)))
        events.append(Event(at, request_id, draw_request(random, request_id, number, at, spec)))
        if random.random() < 0.2:
            at += random.choice((0, 1, random.randint(0, 25)))
            events.append(Event(at, request_id))
            if random.random() < 0.5:
                events.append(Event(at, request_id, draw_request(random, request_id, number + 100, at, spec)))
        if random.random() < 0.1:
            faults[request_id] = random.randint(1, spec.num_slots)
    return World(seed, spec, options, sorted(events, key=lambda event: event.at), faults)


def draw_request(random: Random, request_id: str, number: int, at: int, spec: CacheSpec) -> Request:
    """A request that fits the pool when it has it alone."""
    longest = spec.num_slots - 1
    num_prompt = random.randint(1, random.choice((longest, max(1, longest // 4))))
    max_tokens = random.randint(1, 20)
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=random.choice((0, random.randint(0, max_tokens))),
        ignore_eos=random.random() < 0.5,
        stop_token_ids=tuple(random.sample(range(VOCAB_SIZE), random.choice((0, 0, 5)))),
    )
    prompt = [random.randrange(VOCAB_SIZE) for _ in range(num_prompt)]
    priority, hint = random.randint(0, 3), random.choice((None, max_tokens))
    return Request(request_id, prompt, params, float(at), priority, length_hint=hint, seed=number)
