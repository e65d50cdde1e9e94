"""The kit bites: each of these seeded bugs in the core or a plugin is found, mostly within a few walks."""

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from llmkit.batching import ContinuousBatching
from llmkit.engine.engine import Engine
from llmkit.engine.inputs import InputBuilder
from llmkit.engine.planner import Planner
from llmkit.engine.progress import Progress
from llmkit.engine.residency import Residency
from llmkit.engine.scheduling import PlannedStep
from llmkit.engine.steady import SteadyDecode
from llmkit.interfaces.cache import CacheSpec
from llmkit.testing import ReferenceCache, check_cache, check_scheduler
from llmkit.testing.caches import audit
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.hashed import HashIndex
from llmkit_caches.index import PrefixIndex
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache
from llmkit_caches.radix_tree import RadixIndex
from llmkit_caches.sharing import SharingCache

Bug = tuple[Callable[..., Any], str, str]

CORE: dict[str, Bug] = {
    "blocks come back while a step in flight names them": (
        Residency.leave, "if request.last_step_id >= self.num_landed_steps:", "if False:"),
    "blocks come back one step early": (Residency.land, "self._pinned[0][0] <= step_id", "True"),
    "a slot comes back while a step in flight names it": (
        Residency.leave, "self._pinned.append(", "self._free_slots.append(slot); self._pinned.append("),
    "a request that leaves keeps its epoch": (
        Residency.leave, "request.epoch, request.slot = 0, -1", "request.slot = -1"),
    "results of an earlier stay are taken in": (Planner.land, "or request.epoch != epoch", ""),
    "an id counts as free while its blocks are in flight": (
        Residency.is_pinned, "pinned.request_id == request.request_id", "pinned is request"),
    "computed tokens survive a preemption": (
        Residency.leave, "request.num_computed_tokens = request.num_in", "request.num_in"),
    "the block table is not sent again after a preemption": (
        Residency.leave, "request.num_blocks = request.num_sent_blocks = request", "request.num_blocks = request"),
    "new blocks are not sent": (Planner._edits, "one.num_blocks > one.num_sent_blocks", "not one.num_sent_blocks"),
    "what a window has left behind is sent": (
        Residency.edit, "max(request.num_sent_blocks, request.num_released_blocks)", "request.num_sent_blocks"),
    "blocks that a window has left behind are awaited": (
        Residency.leave, "request.num_blocks - request.num_released_blocks, request", "request.num_blocks, request"),
    "tables begin with what a window has left behind": (InputBuilder._tables, "(columns >= first) & ", ""),
    "a grant is larger than the pool behind a window": (
        PlannedStep.run, "min(num_tokens, self._residency.num_fitting_tokens(request, start))", "num_tokens"),
    "a first grant is larger than the pool": (
        PlannedStep._admit, "self.num_free_tokens, num_fitting)", "self.num_free_tokens)"),
    "pending samples are not counted": (
        Planner._compile, "request.num_tokens + request.num_pending_samples", "request.num_tokens"),
    "tokens in flight are scheduled again": (
        PlannedStep.run, "num_computed_tokens + request.num_in_flight_tokens", "num_computed_tokens"),
    "requests run past their length": (PlannedStep.run, "target >= request.max_num_tokens or", ""),
    "a grant exceeds the token budget": (PlannedStep.run, "if num_tokens > self.num_free_tokens:", "if False:"),
    "a grant reserves one token too few": (PlannedStep.run, "= start + num_tokens", "= start + num_tokens - 1"),
    "admissions are not charged to the token budget": (
        PlannedStep._admit, "self.num_free_tokens -= num_tokens", "pass"),
    "a preempted grant still runs": (PlannedStep.preempt, "grants.pop(view, 0)", "grants.get(view, 0)"),
    "a failed row is taken for a token": (Engine._take_in, "if row in result.errors", "if row in ()"),
    "admissions of a failed step stay": (PlannedStep.rollback, "self._residency.leave(view._request)", "pass"),
    "stop tokens end a request before min_tokens": (
        Progress.heed, "in self.stop_ids and is_free_to_stop", "in self.stop_ids"),
    "KV of a failed row is published": (Planner.land, "if row not in failed_rows:", "if True:"),
    "those held back for a request stay when it has ended": (
        Planner.finish, "self._let_go(request.request_id)", "pass"),
    "those held back for a request stay when its prompt is computed": (
        Planner.land, "self._let_go(request_id)", "self._held.pop(request_id, None)"),
    "preempted requests lose their place for good": (
        Planner._update_queues, "self._waiting.insert(0, view)", "pass"),
    "repeated steps are forgotten when the scheduler is asked": (
        Planner._end_repeating, "self._steady.settle()", "pass"),
    "a repeated step that fails lands as if it had not": (Planner.lands_steadily, "if result.errors:", "if False:"),
    "a full block goes unnoticed while steps repeat": (
        SteadyDecode._expect_growth, "- row.start", "- row.start + 1"),
    "new blocks are kept from the device while steps repeat": (
        SteadyDecode._grow, "edit(row.request) for row in rows])", "edit(row.request) for row in ()])"),
    "who has left goes on in repeated steps": (SteadyDecode.leave, "self._gone.add(request)", "pass"),
    "repeated steps run past a request's length": (
        SteadyDecode.plan, "self._to_stop.get(self._num_planned, ())", "()"),
    "nobody ends while steps repeat": (SteadyDecode.full_length, "self._to_stop.get(self._num_landed, ())", "()"),
    "repeated steps pin no blocks": (SteadyDecode._settle, "request.last_step_id =", "_ ="),
    "repeated steps publish too much": (
        SteadyDecode._settle, "num_landed - row.num_landed", "num_planned - row.num_landed"),
    "stop tokens are not heard while steps repeat": (
        Engine._take_in_steadily, "not self._stop_ids.isdisjoint(token_ids)", "False"),
    "results of an earlier stay are heard while steps repeat": (
        Engine._take_in_steadily, "request.epoch != crew.lineup.epochs[row]", "False"),
}  # fmt: skip

BATCHING: dict[str, Bug] = {
    "nobody makes room": (ContinuousBatching._continue, "self._make_room(request, running, step)", "pass"),
    "the oldest gives way to the youngest": (ContinuousBatching.victim, "candidates[-1]", "candidates[0]"),
    "nobody is admitted for long": (
        ContinuousBatching.schedule, "and queue.waiting", "and queue.waiting and step.now % 50 == 49"),
}  # fmt: skip

CACHES: dict[str, Bug] = {
    "one block too few": (SharingCache.allocate, "-(-upto // self.spec.block_size)", "upto // self.spec.block_size"),
    "not all or nothing": (SharingCache._grow, "return False", "pass"),
    "starting is not all or nothing": (SharingCache._start, "return None", "pass"),
    "blocks leak": (SharingCache.free, ", 0)", ", 1)"),
    "truncate takes one block too many": (SharingCache.truncate, "-(-upto //", "(upto //"),
    "blocks are freed twice": (SharingCache._let_go, "self._free.append(block)", "self._free.extend((block, block))"),
    "growth moves the table": (SharingCache._grow, "table.append(block)", "table.insert(0, block)"),
    "blocks are published before they are computed": (
        SharingCache.allocate, "return table is not None and self._grow(table, num_blocks)",
        "done = table is not None and self._grow(table, num_blocks)\n"
        "    self.commit(request, min(upto, request.num_tokens) if done else 0)\n    return done"),
    "more is published than was computed": (
        SharingCache._publish, "= num_computed_tokens // self.spec.block_size",
        "= min(request.num_tokens, len(self.block_table(request)) * self.spec.block_size) // self.spec.block_size"),
    "half a block is published": (
        SharingCache._publish, "= num_computed_tokens // self.spec.block_size",
        "= -(-num_computed_tokens // self.spec.block_size)"),
    "what was reused counts as unpublished": (SharingCache._start, "= len(table)", "= 0"),
    "what was given back counts as published": (SharingCache.truncate, "= len(table)", "= 99"),
    "publication is remembered for the next request of that name": (
        SharingCache.free, "self._num_published.pop(request.request_id, None)", "pass"),
    "reuse is not counted": (SharingCache._start, "self._ref_counts[cached.blocks[0]] += 1", "pass"),
    "reused blocks count as free": (SharingCache._num_taken, "+ sum([cached.is_idle for cached in seen])", ""),
    "more is missing than allocate takes": (
        SharingCache.num_missing_blocks, "self._num_taken(self._reusable(request, num_blocks), num_blocks)",
        "num_blocks"),
    "reused blocks can be evicted": (SharingCache._start, "self._index.use(cached)", "pass"),
    "a block is released while its last key is seen": (
        CacheSpec.num_hidden_blocks, "self.window - 1", "self.window - 2"),
    "one block is released early": (
        SharingCache.commit, "num_hidden_blocks(num_computed_tokens)",
        "num_hidden_blocks(num_computed_tokens + self.spec.block_size)"),
    "one block is released late": (
        SharingCache.commit, "num_hidden_blocks(num_computed_tokens)",
        "num_hidden_blocks(max(0, num_computed_tokens - self.spec.block_size))"),
    "what is released is kept": (SharingCache.commit, "self._let_go(table[index])", "pass"),
    "what is released is freed once more": (SharingCache._release, "block != RELEASED", "True"),
    "releases are remembered for the next request of that name": (
        SharingCache.free, "self._num_released.pop(request.request_id, None)", "pass"),
    "a reused prefix is held whole behind a window": (
        SharingCache._start, "num_released = self._num_hidden(reusable)", "num_released = 0"),
    "a prefix with a gap in the window is reused": (PrefixIndex._num_usable, "not found[at].blocks", "False"),
    "places of evicted blocks stay": (PrefixIndex.evict, "while last", "if last"),
    "what others stand behind cannot go": (PrefixIndex.release, "self._spec.window is not None or", ""),
    "copies that became redundant leak": (SharingCache._publish, "self._free += self._index", "self._index"),
    "a request whose prompt must run reuses": (
        PrefixIndex.find, "request.sampling_params.prompt_logprobs is not None", "False"),
    "the last token is not computed": (PrefixIndex.find, "(request.num_tokens - 1)", "request.num_tokens"),
    "half a block is reused": (
        PrefixIndex.find, "(request.num_tokens - 1) // self._block_size",
        "-(-(request.num_tokens - 1) // self._block_size)"),
    "evicted prefixes are remembered": (PrefixIndex.find, "found[-1].is_gone", "False"),
    "another request's prefixes are remembered": (
        PrefixIndex.find, "self._found.get(request)", "self._found.get(next(iter(self._found), request))"),
    "tenants share": (HashIndex._root, "salt = _salt(request)", "salt = ()"),
    "equal hashes count as equal tokens": (HashIndex._behind, "and cached.token_ids == token_ids", ""),
    "equal hashes count as equal beginnings": (HashIndex._behind, "cached.parent is parent and", ""),
    "an old place in the queue counts": (PrefixIndex.evict, "cached.ticket == ticket", "True"),
    "evicted prefixes can be found": (HashIndex._remove, "bucket.remove(cached)", "pass"),
    "the queue misses what becomes evictable": (PrefixIndex.evict, "last.is_idle and", "False and"),
    "a prefix goes before what stands behind it": (
        PrefixIndex.release, "self._spec.window is not None or self._is_last(cached)", "True"),
    "copies are all kept": (PrefixIndex.release, "len(cached.blocks) > 1", "False"),
    "an unused copy stands beside a used one": (PrefixIndex.publish, "if cached.is_idle:", "if False:"),
    "a tree grows for all tenants": (RadixIndex._add, "setdefault(request.tenant,", "setdefault('',"),
    "runs are not compared": (
        RadixIndex._extend, "self._num_equal(node.token_ids, at * size, token_ids, start, num)", "num"),
    "halves of runs are not compared": (RadixIndex._num_equal, "first, last = low", "first, last = middle"),
    "the first difference in a run is found one block late": (RadixIndex._num_equal, "return low", "return low + 1"),
    "a run is left without being split": (RadixIndex._add, "parent.at + 1 < len(node.run)", "False"),
    "a split forgets what branches off": (RadixIndex._split, "node.run[at:], node.children)", "node.run[at:])"),
    "a split leaves blocks in the wrong run": (RadixIndex._split, "cached.node, cached.at = behind, place", "pass"),
    "a split leaves branches on the wrong run": (RadixIndex._split, "child.parent = behind", "pass"),
    "runs go on behind a branch": (RadixIndex._add, "or node.children:", "or False:"),
    "an empty run stays": (RadixIndex._remove, "del parent.children[token_ids]", "pass"),
    "tokens of an evicted block stay": (RadixIndex._remove, "del node.token_ids[-size:]", "pass"),
    "holes overlap": (ContiguousCache.allocate, "(start + size, length - size)", "(start + size - 1, length - size)"),
    "holes never merge": (ContiguousCache.free, "sum(merged[-1]) == start", "False"),
    "a run is freed twice": (ContiguousCache.free, "self._runs.pop(", "self._runs.get("),
}  # fmt: skip


class Colliding(PagedCache):
    """Whose hashes are equal most of the time."""

    hash_function = staticmethod(lambda parent, token_ids: sum(token_ids) % 3)


def plant(monkeypatch: pytest.MonkeyPatch, bug: Bug) -> str:
    """Replace text in the source of one method or function, where it must occur exactly once; the name of its class."""
    method, old, new = bug
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count(old) == 1, f"{method.__qualname__} has {source.count(old)} times {old!r}"
    module, namespace = sys.modules[method.__module__], dict[str, Any]()
    exec("from __future__ import annotations\n" + source.replace(old, new), vars(module), namespace)
    owner, name = method.__qualname__.rpartition(".")[0], method.__name__
    holders = [vars(module)[owner]] if owner else [m for m in sys.modules.values() if vars(m).get(name) is method]
    for holder in holders:
        monkeypatch.setattr(holder, name, namespace[name])
    return owner


@pytest.mark.mutant
@pytest.mark.parametrize("bug", CORE)
def test_bugs_of_the_core_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, CORE[bug])
    with pytest.raises(AssertionError, match="seed"):
        check_scheduler(ContinuousBatching, caches=[PagedCache], seeds=range(40))  # finds most, and soon
        check_cache(PagedCache, seeds=range(60))


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BATCHING)
def test_bugs_of_a_scheduler_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, BATCHING[bug])
    with pytest.raises(AssertionError, match="seed"):
        check_scheduler(ContinuousBatching, caches=[ReferenceCache], seeds=range(60))


@pytest.mark.mutant
@pytest.mark.parametrize("bug", CACHES)
def test_bugs_of_a_cache_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = plant(monkeypatch, CACHES[bug])
    cache = {"ContiguousCache": ContiguousCache, "RadixIndex": RadixCache}.get(owner, Colliding)
    with pytest.raises(AssertionError, match="seed"):
        for seed in range(100):
            audit(cache, seed, {})
        check_cache(cache, seeds=range(60))
