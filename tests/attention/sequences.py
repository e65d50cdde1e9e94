"""Sequences in a scrambled block pool, what attention over them must give, computed densely in float64, and graphs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from llmkit.interfaces.attention import AttentionBackend, AttentionBatch, AttentionRequirements, LayerSpec
from llmkit.types import BlockCopy

CPU = torch.device("cpu")
GARBAGE = 1e4

Rows = Sequence[tuple[str, int]]
"""(sequence, number of new tokens) of every row of a step."""


def captured(
    backend: AttentionBackend, batch: AttentionBatch, *projected: torch.Tensor
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A step of the first layer, run once and then captured in a graph; with what it writes at every replay."""
    backend.plan(batch)
    backend.forward(0, *projected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.plan(batch)
        out = backend.forward(0, *projected)
    return graph, out


def dense(spec: LayerSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of the last n tokens of a sequence over all S: [n, H, D] and [S, Hkv, D] -> [n, H, D], float64."""
    ratio, num_new = spec.num_heads // spec.num_kv_heads, len(query)
    key, value = (tensor.double().repeat_interleave(ratio, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    keys = torch.arange(len(key))
    for new in range(num_new):
        last = len(key) - num_new + new
        first = 0 if spec.window is None else last + 1 - spec.window
        scores[:, new, (keys < first) | (keys > last)] = float("-inf")
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), value)


@dataclass
class Stored:
    """One sequence: its blocks, and the keys and values of every layer, each [length, Hkv, D]."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    blocks: list[int] = field(default_factory=list)
    length: int = 0


class Sequences:
    """Grows sequences step by step through a backend. Every slot of the pool holds large garbage before it is used,
    and block-table entries behind a row's own blocks name blocks of others."""

    def __init__(
        self,
        backend: type[AttentionBackend],
        layers: Sequence[LayerSpec],
        dtype: torch.dtype = torch.float64,
        block_size: int = 4,
        num_blocks: int = 48,
        seed: int = 0,
    ) -> None:
        name = str(dtype).removeprefix("torch.")
        self.requirements = AttentionRequirements("cpu", name, block_size, tuple(layers))
        assert backend.check(self.requirements) == []
        self.backend = backend(backend.Settings(), self.requirements, dtype, CPU)
        self.backend.allocate(num_blocks)
        self.dtype, self.num_blocks = dtype, num_blocks
        self.stored: dict[str, Stored] = {}
        self._random, self._generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self._free = list(range(num_blocks))
        self._spill()
        self._random.shuffle(self._free)

    def free(self, name: str) -> None:
        """End a sequence; its blocks go to others with what they hold."""
        self._free += self.stored.pop(name).blocks
        self._random.shuffle(self._free)

    def swap(self, *names: str) -> None:
        """Sequences wait on the host, in blocks of any order, while others write where they were; then they go on."""
        assert self.backend.allocate_host(self.num_blocks)
        blocks = [block for name in names for block in self.stored[name].blocks]
        host_blocks = self._random.sample(range(self.num_blocks), len(blocks) // 2)
        host_blocks += [block for block in range(self.num_blocks) if block not in host_blocks][: -(-len(blocks) // 2)]
        self.backend.save_blocks(blocks, host_blocks)
        self._free += blocks
        self._spill()
        self._random.shuffle(self._free)
        for name in names:
            num = len(self.stored[name].blocks)
            self.stored[name].blocks = [self._free.pop() for _ in range(num)]
        now = [block for name in names for block in self.stored[name].blocks]
        assert now != blocks
        self.backend.restore_blocks(host_blocks, now)

    def fork(self, parent: str, num_tokens: int, *names: str) -> None:
        """Others start on the first tokens of `parent`: they share its full blocks and copy what is left."""
        theirs, (num_full, num_left) = self.stored[parent], divmod(num_tokens, self.requirements.block_size)
        copies = []
        for name in names:
            blocks, layers = theirs.blocks[:num_full], [(k[:num_tokens], v[:num_tokens]) for k, v in theirs.layers]
            if num_left:
                blocks.append(self._free.pop())
                copies.append(BlockCopy(theirs.blocks[num_full], blocks[-1], num_left))
            self.stored[name] = Stored(layers, blocks, num_tokens)
        self.backend.copy_blocks(copies)

    def step(self, rows: Rows, slack: int = 0) -> float:
        """Run a step in every layer; the largest absolute error. Host lengths are `slack` above the exact ones."""
        for name, num_new in rows:
            self._grow(name, num_new)
        self.backend.plan(self.batch(rows, slack))
        return max(self._attend(layer, rows) for layer in range(len(self.requirements.layers)))

    def batch(self, rows: Rows, slack: int = 0) -> AttentionBatch:
        """The step as the engine would describe it, after its sequences have grown."""
        block_size = self.requirements.block_size
        lens = [num_new for _, num_new in rows]
        sequences = [self.stored[name] for name, _ in rows]
        seq_lens = [sequence.length for sequence in sequences]
        host = [min(length + slack, self.num_blocks * block_size) for length in seq_lens]
        width = -(-max(host) // block_size)
        positions = [p for s, n in zip(sequences, lens, strict=True) for p in range(s.length - n, s.length)]
        owners = [s for s, n in zip(sequences, lens, strict=True) for _ in range(n)]
        slots = [
            s.blocks[p // block_size] * block_size + p % block_size for s, p in zip(owners, positions, strict=True)
        ]
        strangers = [self._random.choices(range(self.num_blocks), k=width) for _ in rows]
        table = [(s.blocks + other)[:width] for s, other in zip(sequences, strangers, strict=True)]
        return AttentionBatch(
            query_start_loc=torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            positions=torch.tensor(positions),
            block_table=torch.tensor(table, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            max_query_len=max(lens),
            max_seq_len=max(host),
            query_lens=tuple(lens),
            host_seq_lens=tuple(host),
        )

    def draw(self, layer: int, num_tokens: int) -> Iterable[torch.Tensor]:
        """Random query, key and value, strided as slices of a merged projection are."""
        spec = self.requirements.layers[layer]
        shape = (num_tokens, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        merged = torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)
        return merged.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)

    def _attend(self, layer: int, rows: Rows) -> float:
        lens = [num_new for _, num_new in rows]
        query, key, value = self.draw(layer, sum(lens))
        out = self.backend.forward(layer, query, key, value)
        assert out.shape == query.shape and out.dtype is self.dtype and out.is_contiguous()
        assert out.isfinite().all()  # a NaN is no larger than any error
        error = 0.0
        splits = (tensor.split(lens) for tensor in (query, key, value, out))
        for (name, _), q, k, v, got in zip(rows, *splits, strict=True):
            layers = self.stored[name].layers
            kept = self.kept(k), self.kept(v)
            layers[layer] = torch.cat([layers[layer][0], kept[0]]), torch.cat([layers[layer][1], kept[1]])
            error = max(error, float((got - dense(self.requirements.layers[layer], q, *layers[layer])).abs().max()))
        return error

    def kept(self, new: torch.Tensor) -> torch.Tensor:
        """What a backend keeps of new keys or values."""
        return new

    def _grow(self, name: str, num_new: int) -> None:
        layers = self.requirements.layers
        empty = [torch.empty(0, s.num_kv_heads, s.head_dim, dtype=self.dtype) for s in layers]
        sequence = self.stored.setdefault(name, Stored([(none, none) for none in empty]))
        sequence.length += num_new
        while len(sequence.blocks) * self.requirements.block_size < sequence.length:
            sequence.blocks.append(self._free.pop())

    def _spill(self) -> None:
        """Write garbage into every free slot, by sequences of one block that end at once."""
        rows = [(f"garbage {n}", self.requirements.block_size) for n in range(len(self._free))]
        for name, num_tokens in rows:
            self._grow(name, num_tokens)
        self.backend.plan(self.batch(rows))
        for layer in range(len(self.requirements.layers)):
            query, key, value = self.draw(layer, len(rows) * self.requirements.block_size)
            self.backend.forward(layer, query, GARBAGE * key, GARBAGE * value)
        for name, _ in rows:
            self.free(name)
