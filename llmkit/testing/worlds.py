"""Small random situations for the kit: tiny pools, awkward limits, requests that come, go and come back.

A world is a pure function of its seed. The pools are so small that blocks run out in most of them; the vocabulary has
mostly two or three tokens, and prompts begin like earlier ones, so that prefixes collide.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random
from typing import NamedTuple

from llmkit.engine.limits import EngineLimits
from llmkit.interfaces.cache import CacheSpec
from llmkit.types import Request, SamplingParams

VOCABULARIES = ((2, ()), (2, (1,)), (3, ()), (50, (7, 11)))
"""(size, ids that end a request unless it ignores them)."""


class Rule(Enum):
    """What can happen to an engine.

    `FORK` wants one more sample of a live request's prompt; `PREEMPT` takes out a running request; `PROBE` asks the
    cache for a prompt.
    """

    ADD = "add"
    FORK = "fork"
    STEP = "step"
    ABORT = "abort"
    RESET = "abort everything"
    PREEMPT = "preempt"
    PROBE = "probe"


class Event(NamedTuple):
    """`rule` is applied at step `at`: to `request`, to `request_id`, or to the running request that `number` picks.

    With `ADD`, `number` more samples of the same prompt come behind the first. With `FORK`, `number` is the seed.
    """

    at: int
    rule: Rule
    request_id: str = ""
    request: Request | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class World:
    """Everything a walk depends on except the components under test. `faults` and `packs` are for `OracleExecutor`.

    A preempted request may wait in one of `num_host_blocks` of host memory, where there are any.
    Token counts are checked after every `looks_every`-th step only, since looking at them brings them up to date.
    """

    seed: int
    spec: CacheSpec
    scheduler_options: dict[str, int]
    events: list[Event]
    limits: EngineLimits
    faults: dict[str, int] = field(default_factory=dict)
    packs: bool = True
    looks_every: int = 1
    num_host_blocks: int = 0

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.scheduler_options.items())
        pool = f"{self.spec.num_blocks} blocks of {self.spec.block_size}"
        window = "" if self.spec.window is None else f", a window of {self.spec.window}"
        return f"{pool}{window}, {options}, {len(self.events)} events"


@dataclass(frozen=True, slots=True)
class Draws:
    """Draws requests over one pool. Where it is crowded they come at once, are short and grow long: all want room."""

    random: Random
    spec: CacheSpec
    vocab_size: int = 2
    is_crowded: bool = False
    prompts: list[list[int]] = field(default_factory=list)

    def request(self, request_id: str, number: int, at: int) -> Request:
        """A request that fits the pool when it has it alone; its prompt may begin like an earlier one."""
        random, longest = self.random, self.spec.num_slots - 1
        most = max(1, longest // 4)
        num_prompt = random.randint(1, most if self.is_crowded else random.choice((longest, most)))
        max_tokens = random.randint(longest // 3 + 1, longest) if self.is_crowded else random.randint(1, 20)
        num_stops = 0 if self.is_crowded else random.choice((0, 0, 0, 1 if self.vocab_size < 5 else 5))
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=random.choice((0, random.randint(0, max_tokens))),
            ignore_eos=self.is_crowded or random.random() < 0.5,
            stop_token_ids=tuple(random.sample(range(self.vocab_size), num_stops)),
            prompt_logprobs=1 if number % 5 == 4 else None,
        )
        prompt = self.prompt(num_prompt)
        self.prompts.append(prompt)
        priority, hint, tenant = (
            random.randint(0, 3),
            random.choice((None, max_tokens)),
            random.choice(("", "", "", "a")),
        )
        deadline = float(at + 5 + 11 * number % 60) if number % 3 == 1 and not self.is_crowded else None
        # Seeds repeat, so that whole conversations do.
        return Request(request_id, prompt, params, float(at), priority, tenant, deadline, hint, seed=number % 3)

    def prompt(self, length: int) -> list[int]:
        """Tokens, at first mostly those of an earlier prompt."""
        prompt = [self.random.randrange(self.vocab_size) for _ in range(length)]
        if self.prompts and self.random.random() < 0.6:
            num_same = self.random.choice((length, self.random.randint(1, length)))
            head = self.random.choice(self.prompts)[:num_same]
            prompt[: len(head)] = head
        return prompt

    def requests(self) -> list[Event]:
        """Requests that come, some of which the caller aborts, and some of those come back under the same id."""
        random = self.random
        events: list[Event] = []
        for number in range(random.randint(2 if self.is_crowded else 1, 12)):
            name = str(number)
            at = 0 if self.is_crowded else random.choice((0, random.randint(0, 40), random.randint(0, 90)))
            num_more = 2 if number % 4 == 3 else 0
            one = self.request(name, number, at)
            if self.is_crowded and events and random.random() < 0.4 and events[-1].request:
                one = replace(events[-1].request, request_id=name)  # a twin: only their order tells them apart
            events.append(Event(at, Rule.ADD, name, one, num_more))
            if not self.is_crowded and random.random() < 0.25:
                at += random.choice((0, 1, random.randint(0, 25)))
                events.append(Event(at, Rule.ABORT, name))
                if random.random() < 0.5:
                    events.append(Event(at, Rule.ADD, name, self.request(name, number + 100, at)))
        return events

    def forks(self, events: list[Event]) -> list[Event]:
        """More samples of requests that came some time before; of its own randomness, to leave all else as it is."""
        random = Random(f"forks of {self.prompts}")
        added = [event for event in events if event.rule is Rule.ADD]
        delays = [(event, random.choice((0, 1, random.randint(2, 30)))) for event in added if random.random() < 0.4]
        return [
            Event(event.at + delay, Rule.FORK, event.request_id, number=number)
            for number, (event, delay) in enumerate(delays, 3)
        ]

    def interferences(self) -> list[Event]:
        """Preemptions out of the blue, everything aborted, a prompt that is too long, questions to the cache."""
        random, one = self.random, SamplingParams(max_tokens=1)
        num_preemptions, num_probes = random.choice((0, 0, 1, 8)), random.choice((0, 1, 4))
        events = [
            Event(random.randint(1, 60), Rule.PREEMPT, number=random.randrange(8)) for _ in range(num_preemptions)
        ]
        if random.random() < 0.1:
            events.append(Event(random.randint(1, 40), Rule.RESET))
        if random.random() < 0.1:
            prompt, at = [0] * (self.spec.num_slots + random.randint(0, 3)), random.randint(0, 9)
            events.append(Event(at, Rule.ADD, "huge", Request("huge", prompt, one, arrival_time=at)))
        for number in range(num_probes):
            prompt = self.prompt(random.randint(1, 2 * self.spec.block_size + 1))
            events.append(Event(random.randint(0, 60), Rule.PROBE, request=Request(f"probe {number}", prompt, one)))
        return events


def windowed(world: World) -> World:
    """The same world for a model whose layers all have a window: requests and steps may be longer than the pool."""
    random = Random(f"window {world.seed}")
    window = random.randint(1, world.spec.num_slots)
    times, events = random.choice((1, 2, 4)), []
    for event in world.events:
        if event.request is not None:
            params = event.request.sampling_params
            longer = params.model_copy(update={"max_tokens": params.max_tokens * times})
            prompt = event.request.token_ids * random.choice((1, times))
            one = replace(event.request, token_ids=prompt, sampling_params=longer, max_num_tokens=0)
            event = event._replace(request=one)
        events.append(event)
    limits = replace(world.limits, max_model_len=world.limits.max_model_len * times)
    options, budget = dict(world.scheduler_options), "max_num_batched_tokens"
    options[budget] *= times
    spec = replace(world.spec, window=window)
    return replace(world, spec=spec, scheduler_options=options, events=events, limits=limits)


def draw_world(seed: int) -> World:
    """The world of that seed. A crowded one is left in peace, or what gets nowhere would be saved by an abort."""
    random = Random(seed)
    is_crowded = random.random() < 0.25
    spec = CacheSpec(random.randint(4, 24), random.choice((1, 1, 1, 2)) if is_crowded else random.randint(1, 8))
    options = {
        "max_num_seqs": random.randint(2 if is_crowded else 1, 8),
        "max_num_batched_tokens": random.randint(1, 30),
        "max_chunk_tokens": random.choice((0, 1, 3, spec.block_size)),
    }
    vocab_size, eos = random.choice(VOCABULARIES)
    draws = Draws(random, spec, vocab_size, is_crowded)
    events, faults, reach = draws.requests(), dict[str, int](), spec.num_slots
    if not is_crowded:
        events += [*draws.interferences(), *draws.forks(events)] if random.random() < 0.7 else []
        names = dict.fromkeys(event.request_id for event in events if event.request)
        faults = {name: random.randint(1, spec.num_slots) for name in names if random.random() < 0.2}
        reach = random.choice((reach, reach, random.randint(2, reach)))
    limits, packs = EngineLimits(vocab_size, reach, frozenset(eos)), random.random() < 0.25
    looks_every = random.choice((1, 1, 2, 7))
    num_host_blocks = random.choice((0, 0, random.randint(1, 2 * spec.num_blocks)))
    events.sort(key=lambda event: event.at)
    return World(seed, spec, options, events, limits, faults, packs, looks_every, num_host_blocks)
