"""A backend for each group of layers behind one: who serves which layer, with which tables, eagerly and in graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from llmkit.engine.decode_graph import DecodeGraphs
from llmkit.engine.executor import TorchExecutor
from llmkit.engine.grouped_attention import GroupedAttention, GroupedBatch, LayerGroup, divide, layer_groups
from llmkit.engine.inputs import InputBuilder
from llmkit.engine.mixed_graph import Device, MixedGraphs, columns, pack
from llmkit.interfaces.attention import AttentionBatch, AttentionRequirements, LayerSpec
from llmkit.types import BlockTableEdit, ScheduledRequest, StepPlan
from llmkit_attention.sdpa import SdpaAttention

WINDOWS = (8, None, 8, 32, None, 8)
LAYERS = tuple(LayerSpec(4, 2, 8, 1.0, window) for window in WINDOWS)
ASKED = AttentionRequirements("cpu", "float32", 4, LAYERS)
ROWS = tuple(ScheduledRequest(str(slot), slot, start, 1, True, 1) for slot, start in ((2, 6), (0, 9), (3, 0)))


def test_layers_are_grouped_by_window_those_who_see_furthest_first() -> None:
    full, wide, narrow = LayerGroup(None, (1, 4)), LayerGroup(32, (3,)), LayerGroup(8, (0, 2, 5))
    assert layer_groups(ASKED, 33) == [full, wide, narrow]
    assert layer_groups(ASKED, 32) == [LayerGroup(None, (1, 3, 4)), narrow], "a window that nobody outgrows"
    assert layer_groups(ASKED, 8) == [LayerGroup(None, (0, 1, 2, 3, 4, 5))]
    windowed = replace(ASKED, layers=(LAYERS[0], LAYERS[3]))
    assert layer_groups(windowed, 99) == [LayerGroup(32, (1,)), LayerGroup(8, (0,))]


class Telling(SdpaAttention):
    """Says who was asked for what."""

    heard: list[tuple[Any, ...]]
    can_be_captured = True
    shares_from = 1 << 60

    def plan(self, batch: AttentionBatch) -> None:
        self.heard = [("plan", batch.slot_mapping.tolist())]

    def capturable(self, batch: AttentionBatch) -> bool:
        return self.can_be_captured

    def reads_once(self, num_repeated_keys: int) -> bool:
        return num_repeated_keys >= self.shares_from

    def slots(self, layer: int) -> Any:
        self.heard.append(("slots", layer))

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        self.heard.append(("attend", layer))
        return query

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.heard.append(("forward", layer))
        return query


def grouped() -> GroupedAttention:
    whole = Telling(Telling.Settings(), ASKED, torch.float32, torch.device("cpu"))
    groups = layer_groups(ASKED, 99)
    return GroupedAttention(whole, groups, divide(whole, groups))


def batch_of(slots: list[int]) -> AttentionBatch:
    ones = torch.ones(len(slots), dtype=torch.int32)
    table = torch.zeros(len(slots), 1, dtype=torch.int32)
    mapping = torch.tensor(slots)
    return AttentionBatch(ones.cumsum(0), ones, ones.long(), table, mapping, 1, 1, (1,) * len(slots), (1,) * len(slots))


def test_each_layer_is_served_by_its_group() -> None:
    attention, tensor = grouped(), torch.zeros(1, 4, 8)
    backends: Any = attention.backends
    assert [[layer.window for layer in one.requirements.layers] for one in backends] == [[None] * 2, [32], [8] * 3]
    assert attention.bytes_per_block() == 6 * 2 * 2 * 8 * 4 * 4 == sum(one.bytes_per_block() for one in backends)
    attention.plan(GroupedBatch.of([batch_of([number]) for number in (5, 6, 7)]))
    assert [one.heard for one in backends] == [[("plan", [5])], [("plan", [6])], [("plan", [7])]]
    for layer in range(6):
        attention.forward(layer, tensor, tensor, tensor)
        attention.slots(layer)
        attention.attend(layer, tensor)
    for one, layers in zip(backends, ((0, 1), (0,), (0, 1, 2)), strict=True):
        assert one.heard[1:] == [(what, layer) for layer in layers for what in ("forward", "slots", "attend")]


def test_a_step_is_captured_if_every_group_can_be() -> None:
    attention, batch = grouped(), GroupedBatch.of([batch_of([1])] * 3)
    backends: Any = attention.backends
    assert attention.capturable(batch)
    backends[2].can_be_captured = False
    assert not attention.capturable(batch)


def test_repeated_keys_are_counted_if_any_group_reads_them_once() -> None:
    attention = grouped()
    backends: Any = attention.backends
    assert not attention.reads_once(100)
    backends[0].shares_from = 100
    assert attention.reads_once(100) and not attention.reads_once(99)


def test_a_batch_without_further_tables_is_refused() -> None:
    with pytest.raises(AssertionError, match="without tables of further groups"):
        grouped().plan(batch_of([1]))
    with pytest.raises(ValueError, match="shorter"):
        grouped().plan(GroupedBatch.of([batch_of([1])] * 2))


def step() -> tuple[StepPlan, list[InputBuilder]]:
    """Three rows of a token each in pools of three groups, and the host's tables after its edits."""
    random = np.random.default_rng(0)
    edits = [
        tuple(BlockTableEdit(row.slot, 0, tuple(random.permutation(90)[:3].tolist())) for row in ROWS) for _ in range(3)
    ]
    plan = StepPlan(0, ROWS, (), edits[0], None, tuple(edits[1:]))
    builders = [InputBuilder(4, 16, 4, window) for window in (None, 5, 2)]
    for number, builder in enumerate(builders):
        builder.apply(plan.of_group(number))
    return plan, builders


def test_an_eager_step_carries_the_tables_of_every_group() -> None:
    plan, builders = step()
    tokens = torch.zeros(5, 17, dtype=torch.long)
    executor = TorchExecutor(None, grouped(), None, builders[0], tokens, more_inputs=builders[1:])  # type: ignore[arg-type]
    packed = [builder.build(plan) for builder in builders]
    batch = executor._grouped(executor._batch(packed[0], torch.tensor([6, 9, 0])), plan)
    for one, wanted in zip((batch, *batch.others), packed, strict=True):
        assert one.block_table.tolist() == wanted.block_table.tolist()
        assert one.slot_mapping.tolist() == wanted.slot_mapping.tolist()
        assert one.fresh_blocks is not None and one.fresh_blocks.tolist() == wanted.fresh_blocks.tolist()
        assert one.positions.tolist() == [6, 9, 0] and one.seq_lens.tolist() == [7, 10, 1]
    assert len({tuple(one.slot_mapping.tolist()) for one in (batch, *batch.others)}) == 3


def test_a_captured_step_reads_the_tables_of_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph would run, without a GPU: rows that fill a bucket up have no place in any group."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    plan, builders = step()
    tables = [builder.block_tables for builder in builders]
    backend: Any = grouped()
    tokens = torch.zeros(5, 17, dtype=torch.long)
    graphs = DecodeGraphs(None, backend, None, tokens, tables[0], tables[1:])  # type: ignore[arg-type]
    assert graphs.is_supported()
    graphs.apply(plan)
    batch: Any = graphs._batch(torch.from_numpy(graphs._inputs(plan, 5)))
    padding: Any = graphs._batch(graphs._padding(2))
    for number, one in enumerate((batch, *batch.others)):
        wanted = builders[number].build(plan)
        assert one.slot_mapping.tolist() == [*wanted.slot_mapping.tolist(), -1, -1]
        assert one.block_table[:3].tolist() == tables[number][[2, 0, 3]].tolist()
        assert one.seq_lens.tolist() == [7, 10, 1, 0, 0] and one.positions.tolist() == [6, 9, 0, 0, 0]
        assert (padding, *padding.others)[number].slot_mapping.tolist() == [-1, -1]


def test_a_captured_step_with_prompts_reads_them_too() -> None:
    plan, builders = step()
    rows = (ROWS[0]._replace(start=2, num_tokens=5), *ROWS[1:])
    plan = replace(plan, scheduled=rows)
    tables = [torch.cat([torch.from_numpy(one.block_tables), torch.zeros(1, 4, dtype=torch.int32)]) for one in builders]
    tokens, nothing = torch.zeros(5, 17, dtype=torch.long), cast(Any, None)
    device = Device(nothing, grouped(), nothing, tokens, tables[0], nothing, tables[1:])
    _, batch = pack(device, torch.from_numpy(columns(rows, 4, 4)), 9)
    for number, one in enumerate((batch, *cast(GroupedBatch, batch).others)):
        wanted = builders[number].build(plan)
        assert one.slot_mapping.tolist() == [*wanted.slot_mapping.tolist(), -1, -1]
        assert one.block_table[:3].tolist() == tables[number][[2, 0, 3]].tolist()
    assert MixedGraphs(device).is_supported()


def test_tables_of_one_group_make_a_plain_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    plan, builders = step()
    tokens, backend = torch.zeros(5, 17, dtype=torch.long), grouped().backends[0]
    graphs = DecodeGraphs(None, backend, None, tokens, builders[0].block_tables)  # type: ignore[arg-type]
    graphs.apply(replace(plan, more_edits=()))
    inputs = graphs._inputs(plan, 4)
    assert inputs.shape == (4, 4) and type(graphs._batch(torch.from_numpy(inputs))) is AttentionBatch
