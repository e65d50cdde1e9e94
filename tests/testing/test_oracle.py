"""The oracle bites: plans and packed arrays with one slip each are refused, and so is memory reused too early."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmkit.batching import ContinuousBatching
from llmkit.engine.inputs import InputBuilder, PackedInputs
from llmkit.testing import OracleExecutor, check_cache, check_scheduler, next_token
from llmkit.testing.worlds import draw_world
from llmkit.types import Admission, BlockCopies, BlockCopy, BlockTableEdit, SamplingParams, ScheduledRequest, StepPlan
from llmkit_caches.paged import PagedCache

IDS = (1, 0, 1, 1, 0)


def oracle(packs: bool = True) -> OracleExecutor:
    return OracleExecutor(block_size=4, max_num_seqs=3, max_model_len=16, packs=packs)


def row(start: int, num_tokens: int, samples: bool = True, *, name: str = "a", slot: int = 0) -> ScheduledRequest:
    return ScheduledRequest(name, slot, start, num_tokens, samples, 1)


def plan(*rows: ScheduledRequest, blocks: tuple[int, ...] = (3, 1), name: str = "a", slot: int = 0) -> StepPlan:
    admission = Admission(slot, name, IDS, len(IDS), SamplingParams(), 0)
    return StepPlan(0, rows, (admission,), (BlockTableEdit(slot, 0, blocks),))


@pytest.mark.parametrize("packs", [True, False])
def test_tokens_are_a_hash_of_what_is_read(packs: bool) -> None:
    executor = oracle(packs)
    first = executor.launch(plan(row(0, 5)))
    tokens = [first.wait().token_ids[0]]
    for start in range(5, 8):
        tokens += executor.launch(StepPlan(start, (row(start, 1),))).wait().token_ids
    known = list(IDS)
    for token in tokens:
        assert token == next_token(0, known, 2)
        known.append(token)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (plan(row(0, 6)), "runs to 6, but knows 5 tokens"),
        (plan(row(0, 5), blocks=(3,)), "its blocks reach 4"),
        (plan(row(4, 1)), "reads a wrong KV entry at position 0, block 3"),
        (plan(row(0, 4)), "samples=True after 4 of 5 tokens"),
        (plan(row(0, 5, False)), "samples=False after 5 of 5 tokens"),
        (plan(row(0, 5, name="b")), "slot 0 is not the slot of 'b'"),
        (plan(row(0, 5, slot=1)), "'a' runs in slot 1, which nobody has entered"),
        (plan(row(0, 17)), "'a' runs to 17, beyond 16"),
        (plan(row(0, 0, False)), "a row of 0 tokens"),
        (plan(row(0, 4, False), row(4, 1)), "one has two rows"),
        (plan(row(0, 5), blocks=(3, 3)), "reads a wrong KV entry at position 0, block 3"),
    ],
)
def test_plans_a_device_would_get_wrong_are_refused(wrong: StepPlan, message: str, packs: bool) -> None:
    with pytest.raises(AssertionError, match=message):
        executor = oracle(packs)
        executor.launch(wrong)
        executor.launch(StepPlan(1, (row(0, 5),)))


def test_a_block_reused_in_flight_is_refused_though_its_tokens_are_the_same() -> None:
    executor = oracle()
    executor.launch(plan(row(0, 5)))
    with pytest.raises(AssertionError, match=r"'b' writes \{3\}, which 'a' reads in flight"):
        executor.launch(plan(row(0, 5, name="b", slot=1), blocks=(3, 2), name="b", slot=1))


def test_a_block_may_be_reused_once_the_step_has_landed() -> None:
    executor = oracle()
    executor.launch(plan(row(0, 5))).wait()
    executor.launch(plan(row(0, 5, name="b", slot=1), blocks=(3, 2), name="b", slot=1)).wait()
    with pytest.raises(AssertionError, match=r"'a' has 5 entries, a row starts at 4"):
        executor.launch(StepPlan(2, (row(4, 1),)))


def test_a_slot_handed_over_in_flight_is_refused() -> None:
    executor = oracle()
    first = executor.launch(plan(row(0, 5)))
    executor.launch(plan(row(0, 5, name="b"), blocks=(2, 4), name="b"))
    with pytest.raises(AssertionError, match="slot 0 was handed over while in flight"):
        first.wait()


def forked(*copies: BlockCopy, blocks: tuple[int, ...] = (3, 2)) -> StepPlan:
    """`b` starts on the first four tokens and more of `a`, whose blocks are 3 and 1."""
    start = 4 + (copies[0].num_tokens if copies else 0)
    one = replace(plan(row(start, 7 - start, name="b", slot=1), blocks=blocks, name="b", slot=1), step_id=1)
    (admission,) = one.admissions
    return replace(one, admissions=(admission._replace(token_ids=LONGER),), copies=BlockCopies(forks=copies))


LONGER = (*IDS, 0, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (forked(blocks=(1, 2)), "reads a wrong KV entry at position 0, block 1"),
        (replace(forked(BlockCopy(1, 2, 2)), copies=None), "reads a wrong KV entry at position 4, block 2"),
        (forked(BlockCopy(3, 2, 2)), "reads a wrong KV entry at position 4, block 2"),
        (forked(BlockCopy(1, 5, 2)), "reads a wrong KV entry at position 4, block 2"),
        (forked(BlockCopy(1, 2, 2), BlockCopy(1, 2, 1)), "copied to twice"),
        (forked(BlockCopy(6, 2, 2)), r"\[None, None\] of block 6 are copied to 2"),
        (forked(BlockCopy(1, 2, 2), BlockCopy(3, 1, 2)), r"\{1\} are copied to, which 'a' reads in flight"),
    ],
)
@pytest.mark.parametrize("packs", [True, False])
def test_a_copy_that_is_missing_or_wrong_is_refused(wrong: StepPlan, message: str, packs: bool) -> None:
    def start() -> OracleExecutor:
        executor = oracle(packs)
        first = plan(row(0, 7))
        (admission,) = first.admissions
        executor.launch(replace(first, admissions=(admission._replace(token_ids=LONGER),)))
        return executor

    start().launch(forked(BlockCopy(1, 2, 2))).wait()
    with pytest.raises(AssertionError, match=message):
        start().launch(wrong)


def test_all_copies_are_read_before_any_is_made() -> None:
    executor = oracle()
    executor.launch(plan(row(0, 5))).wait()
    before = [executor.entries([block], 4) for block in (3, 1)]
    executor._copy(BlockCopies(forks=(BlockCopy(3, 1, 4), BlockCopy(1, 3, 1))))
    assert [executor.entries([block], 4) for block in (1, 3)] == before


def shifted(packed: PackedInputs) -> PackedInputs:
    return replace(packed, slot_mapping=packed.slot_mapping + 1)


def one_key_short(packed: PackedInputs) -> PackedInputs:
    return replace(packed, seq_lens=packed.seq_lens - 1)


def late_positions(packed: PackedInputs) -> PackedInputs:
    return replace(packed, positions=packed.positions + 1)


def reversed_tables(packed: PackedInputs) -> PackedInputs:
    return replace(packed, block_table=packed.block_table[::-1].copy())


def swapped_blocks(packed: PackedInputs) -> PackedInputs:
    return replace(packed, block_table=packed.block_table[:, ::-1].copy())


def tails_of_others(packed: PackedInputs) -> PackedInputs:
    table = packed.block_table.copy()
    table[:, -1] = table[0, -1]
    return replace(packed, block_table=table)


def dropped_slot(packed: PackedInputs) -> PackedInputs:
    slots = packed.slot_mapping.copy()
    slots[-1] = slots[0]
    return replace(packed, slot_mapping=slots)


def earlier_logits(packed: PackedInputs) -> PackedInputs:
    return replace(packed, logit_tokens=np.maximum(packed.logit_tokens - 1, 0))


def nothing_fresh(packed: PackedInputs) -> PackedInputs:
    return replace(packed, fresh_blocks=packed.fresh_blocks[:0])


def first_rows_tokens(packed: PackedInputs) -> PackedInputs:
    return replace(packed, token_slots=np.full_like(packed.token_slots, packed.token_slots[0]))


SLIPS = [
    shifted, one_key_short, late_positions, reversed_tables, swapped_blocks, tails_of_others, dropped_slot,
    earlier_logits, nothing_fresh, first_rows_tokens,
]  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("slip", SLIPS)
def test_slips_in_packing_are_found(
    slip: Callable[[PackedInputs], PackedInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = InputBuilder.build
    monkeypatch.setattr(InputBuilder, "build", lambda self, plan: slip(build(self, plan)))
    with pytest.raises(AssertionError, match="seed"):
        check_scheduler(ContinuousBatching, seeds=range(40))


@pytest.mark.mutant
@pytest.mark.parametrize("lost", [lambda edit: edit.start > 0, lambda edit: edit.start == 0 and edit.slot == 0])
def test_a_stale_block_table_is_found(lost: Callable[[BlockTableEdit], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is right, but the device does not hear of a table's growth, or of its replacement after a preemption."""
    apply = InputBuilder.apply

    def forgetful(self: Any, plan: StepPlan) -> None:
        has_been_here = self.block_tables.any(axis=1)
        kept = tuple(edit for edit in plan.edits if not (lost(edit) and has_been_here[edit.slot]))
        apply(self, replace(plan, edits=kept))

    monkeypatch.setattr(InputBuilder, "apply", forgetful)
    with pytest.raises(AssertionError, match=r"seed \d+, step \d+: .*(reads a wrong KV entry|in flight|the tags at)"):
        check_cache(PagedCache, seeds=range(40))


def test_worlds_collide_on_purpose() -> None:
    """Few tokens and prompts that begin like others: the precondition of every test of prefix reuse."""
    worlds = [draw_world(seed) for seed in range(200)]
    num_prompts = num_shared = 0
    for world in worlds:
        prompts = [event.request.token_ids for event in world.events if event.request]
        blocks = [tuple(prompt[: world.spec.block_size]) for prompt in prompts]
        num_prompts += len(blocks)
        num_shared += sum(block in blocks[:at] for at, block in enumerate(blocks))
    assert num_shared > 0.4 * num_prompts
    assert sum(world.limits.vocab_size < 4 for world in worlds) > 120
    assert 20 < sum(world.packs for world in worlds) < 100
