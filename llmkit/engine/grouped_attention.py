"""Layers of unlike windows: an attention backend for each group of them, behind one that the network speaks to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from llmkit.interfaces.attention import AttentionBackend, AttentionBatch, AttentionRequirements, KeyValueSlots


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one window, by their numbers; `window` counts keys as in `LayerSpec`."""

    window: int | None
    layers: tuple[int, ...]


def layer_groups(requirements: AttentionRequirements, reach: int) -> list[LayerGroup]:
    """The layers by their windows, those who see furthest first. A window of `reach`, or more, hides nothing."""
    by_window: dict[int | None, list[int]] = {}
    for number, layer in enumerate(requirements.layers):
        sees_all = layer.window is None or layer.window >= reach
        by_window.setdefault(None if sees_all else layer.window, []).append(number)
    windows = sorted(by_window, key=lambda window: float("-inf") if window is None else -window)
    return [LayerGroup(window, tuple(by_window[window])) for window in windows]


def divide(backend: AttentionBackend, groups: Sequence[LayerGroup]) -> list[AttentionBackend]:
    """A backend of the same kind for the layers of each group."""
    asked = backend.requirements
    parts = [replace(asked, layers=tuple([asked.layers[number] for number in group.layers])) for group in groups]
    return [type(backend)(backend.settings, part, backend.dtype, backend.device) for part in parts]


@dataclass(frozen=True, slots=True)
class GroupedBatch(AttentionBatch):
    """A step as the first group of layers sees it, and as each of the `others` does: with tables of its own."""

    others: tuple[AttentionBatch, ...] = ()

    @classmethod
    def of(cls, batches: Sequence[AttentionBatch]) -> GroupedBatch:
        """One for all groups in order, from one for each."""
        first = {one.name: getattr(batches[0], one.name) for one in fields(AttentionBatch)}
        return cls(**first, others=tuple(batches[1:]))


class GroupedAttention(AttentionBackend):
    """Leads each layer to the backend of its group. No backend knows of groups; batches are `GroupedBatch`."""

    def __init__(
        self, whole: AttentionBackend, groups: Sequence[LayerGroup], backends: Sequence[AttentionBackend]
    ) -> None:
        """`backends` serve the layers of `groups`, one each; `whole` is one that would have served all."""
        super().__init__(whole.settings, whole.requirements, whole.dtype, whole.device)
        self.groups = tuple(groups)
        self.backends = tuple(backends)
        self._of_layer = {
            number: (backend, place)
            for group, backend in zip(groups, backends, strict=True)
            for place, number in enumerate(group.layers)
        }

    @classmethod
    def check(cls, requirements: AttentionRequirements) -> list[str]:
        return []

    def bytes_per_block(self) -> int:
        """Memory of one block of every group."""
        return sum(backend.bytes_per_block() for backend in self.backends)

    def allocate(self, num_blocks: int) -> None:
        """The same for each group; pools of unlike sizes are allocated by the backends themselves."""
        for backend in self.backends:
            backend.allocate(num_blocks)

    def plan(self, batch: AttentionBatch) -> None:
        assert isinstance(batch, GroupedBatch), "a batch without tables of further groups"
        for backend, one in zip(self.backends, (batch, *batch.others), strict=True):
            backend.plan(one)

    def capturable(self, batch: AttentionBatch) -> bool:
        assert isinstance(batch, GroupedBatch), "a batch without tables of further groups"
        pairs = zip(self.backends, (batch, *batch.others), strict=True)
        return all(backend.capturable(one) for backend, one in pairs)

    def reads_once(self, num_repeated_keys: int) -> bool:
        return any(backend.reads_once(num_repeated_keys) for backend in self.backends)

    def slots(self, layer: int) -> KeyValueSlots | None:
        backend, place = self._of_layer[layer]
        return backend.slots(place)

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        backend, place = self._of_layer[layer]
        return backend.attend(place, query)

    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        backend, place = self._of_layer[layer]
        return backend.forward(place, query, key, value)


def backends_of(backend: AttentionBackend) -> tuple[AttentionBackend, ...]:
    """The backends of a model's layers, one for each group of them; mostly it is the only one."""
    return backend.backends if isinstance(backend, GroupedAttention) else (backend,)
