"""Small random situations for the kit: tiny pools, awkward limits, requests that come, go and come back.

A world is a pure function of its seed. The pools are so small that blocks run out in most of them; the vocabulary has
mostly two or three tokens, and prompts begin like earlier ones, so that prefixes collide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from llmkit.engine.limits import EngineLimits
from llmkit.interfaces.cache import CacheSpec
from llmkit.types import Request, SamplingParams

VOCABULARIES = ((2, ()), (2, (1,)), (3, ()), (50, (7, 11)))
"""(size, ids that end a request unless it ignores them)."""


@dataclass(frozen=True, slots=True)
class Event:
    """At step `at` the caller adds `request`, or aborts `request_id` if there is none."""

    at: int
    request_id: str
    request: Request | None = None


@dataclass(frozen=True, slots=True)
class World:
    """Everything a walk depends on except the components under test. `faults` and `packs` are for `OracleExecutor`."""

    seed: int
    spec: CacheSpec
    scheduler_options: dict[str, int]
    events: list[Event]
    limits: EngineLimits
    faults: dict[str, int] = field(default_factory=dict)
    packs: bool = True

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
    vocab_size, eos = random.choice(VOCABULARIES)
    limits = EngineLimits(vocab_size, spec.num_slots, frozenset(eos))
    events: list[Event] = []
    faults: dict[str, int] = {}
    earlier: list[list[int]] = []
    for number in range(random.randint(1, 12)):
        request_id = str(number)
        at = random.choice((0, 0, random.randint(0, 40)))
        events.append(Event(at, request_id, draw_request(random, request_id, number, at, spec, vocab_size, earlier)))
        if random.random() < 0.2:
            at += random.choice((0, 1, random.randint(0, 25)))
            events.append(Event(at, request_id))
            if random.random() < 0.5:
                again = draw_request(random, request_id, number + 100, at, spec, vocab_size, earlier)
                events.append(Event(at, request_id, again))
        if random.random() < 0.2:
            faults[request_id] = random.randint(1, spec.num_slots)
    packs = random.random() < 0.25
    return World(seed, spec, options, sorted(events, key=lambda event: event.at), limits, faults, packs)


def draw_request(
    random: Random,
    request_id: str,
    number: int,
    at: int,
    spec: CacheSpec,
    vocab_size: int = 2,
    earlier: list[list[int]] | None = None,
) -> Request:
    """A request that fits the pool when it has it alone; its prompt may begin like one of the `earlier` ones."""
    longest = spec.num_slots - 1
    num_prompt = random.randint(1, random.choice((longest, max(1, longest // 4))))
    max_tokens = random.randint(1, 20)
    num_stops = random.choice((0, 0, 0, 1 if vocab_size < 5 else 5))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=random.choice((0, random.randint(0, max_tokens))),
        ignore_eos=random.random() < 0.5,
        stop_token_ids=tuple(random.sample(range(vocab_size), num_stops)),
        prompt_logprobs=1 if number % 5 == 4 else None,
    )
    prompt = [random.randrange(vocab_size) for _ in range(num_prompt)]
    if earlier and random.random() < 0.6:
        head = random.choice(earlier)[: random.choice((num_prompt, random.randint(1, num_prompt)))]
        prompt[: len(head)] = head
    if earlier is not None:
        earlier.append(prompt)
    priority, hint, tenant = random.randint(0, 3), random.choice((None, max_tokens)), random.choice(("", "", "a", "b"))
    # Seeds repeat, so that whole conversations do.
    return Request(request_id, prompt, params, float(at), priority, tenant, length_hint=hint, seed=number % 3)
