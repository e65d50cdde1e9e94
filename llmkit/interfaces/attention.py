"""The contract of an attention backend: the only place that knows kernels and KV memory layout.

Importing this module does not import torch, so that backends can be listed and checked without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmkit.interfaces.settings import Settings as AnySettings
from llmkit.types import BlockCopy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Attention of one layer. `window` counts the visible keys, the query's own included; None is full causal."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class AttentionRequirements:
    """What a model on a device asks of a backend; `device` is a type like "cpu", `dtype` a name like "bfloat16"."""

    device: str
    dtype: str
    block_size: int
    layers: tuple[LayerSpec, ...]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One packed step: N query tokens of R sequences, built once a step by the core.

    `query_start_loc` int32 [R+1], `seq_lens` int32 [R] (keys after this step), `positions` int64 [N],
    `block_table` int32 [R, max_blocks], `slot_mapping` int64 [N] (block * block_size + offset of each new key);
    `max_query_len` and `max_seq_len` are host-side upper bounds.

    Entries of `block_table` behind a row's own blocks repeat one of them, and so do those of blocks that no query of
    the row sees in any layer; where the batch is captured in a graph the latter are anybody's. `fresh_blocks` int64
    [F], None for F = 0, are the blocks whose first slot this step writes: what they hold behind the new keys is
    somebody's past and may be NaN, which no mask hides (0 * NaN), so a backend that loads it clears them first.

    `num_repeated_keys` estimates on the host how many keys of rows with one token lie in blocks that a row before
    them has too; in a captured batch it is that of the step it was captured for.

    With `lens_are_bounds` the batch is captured for rows of any number of new tokens, none included, up to N in all:
    `query_lens` and `host_seq_lens` are upper bounds, tokens behind the last row's belong to nobody.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    positions: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    max_seq_len: int
    query_lens: tuple[int, ...]
    host_seq_lens: tuple[int, ...]
    fresh_blocks: torch.Tensor | None = None
    num_repeated_keys: int = 0
    lens_are_bounds: bool = False


@dataclass(frozen=True, slots=True)
class KeyValueSlots:
    """Where a step's new keys and values belong.

    `keys`, `values` [num_blocks, num_kv_heads, block_size, head_dim], contiguous; new token n has slot
    `slot_mapping[n]` (int64 [N], block * block_size + offset), or none where that is negative.
    Whoever stores converts to their dtype; what that cannot hold becomes the nearest number that it can.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slot_mapping: torch.Tensor


class AttentionBackend(ABC):
    """Stores keys and values in blocks and attends over them.

    Where layers have unlike windows there may be several of one class, each for some of the layers, with a pool of its
    own. `requirements` are its own then, and `layer` counts those layers only.
    """

    Settings: ClassVar[type[AnySettings]] = AnySettings
    preferred_block_size: ClassVar[int] = 16
    """Tokens per KV block where the user asks for no number."""
    copies_blocks: ClassVar[bool] = False
    """Whether `copy_blocks` works. Without it no request is forked."""

    def __init__(
        self, settings: AnySettings, requirements: AttentionRequirements, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.settings = settings
        self.requirements = requirements
        self.dtype = dtype
        self.device = device

    @classmethod
    @abstractmethod
    def check(cls, requirements: AttentionRequirements) -> list[str]:
        """Reasons why this backend cannot serve `requirements`; empty if it can. Needs no device."""

    @abstractmethod
    def bytes_per_block(self) -> int:
        """Device memory one block takes over all layers."""

    @abstractmethod
    def allocate(self, num_blocks: int) -> None:
        """Create the KV pool, zeroed, before the first `plan`.

        Where memory is measured this is called again: earlier pools, of few blocks, have served trial steps by then.
        """

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks over all layers, behind everything planned so far and before the next step.

        All sources are read before any block is written. What a block holds behind the tokens copied is somebody's
        past, as in `fresh_blocks` of a batch, and may be NaN: a backend that loads it clears it.
        """
        raise NotImplementedError(f"{type(self).__name__} copies no blocks")

    def allocate_host(self, num_blocks: int) -> bool:
        """Create host memory for `num_blocks` blocks; called at most once, after `allocate`.

        False, the default, if this backend cannot copy blocks to the host and back.
        """
        return False

    def save_blocks(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy the KV of `blocks` over all layers to `host_blocks`, behind everything planned so far.

        Neither this nor `restore_blocks` need wait for the copy: whoever reads or writes those blocks comes behind it
        in the device's queue.
        """
        raise NotImplementedError(f"{type(self).__name__} copies nothing to the host")

    def restore_blocks(self, host_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy what was saved to `host_blocks` back, to `blocks`, before the next step."""
        raise NotImplementedError(f"{type(self).__name__} copies nothing to the host")

    @abstractmethod
    def plan(self, batch: AttentionBatch) -> None:
        """Prepare a step: everything that all layers share."""

    def capturable(self, batch: AttentionBatch) -> bool:
        """Whether `plan` and the `forward`s of `batch` may be captured in a CUDA graph and replayed for other batches.

        True promises: launches depend only on shapes, `max_query_len` and `max_seq_len`; what the
        tensors of `batch` hold is read on the device, and a replay after new contents were copied into the same tensors
        (lengths up to `max_seq_len`) equals a fresh step. Rows that fill up have one token, `seq_lens` 0 and slot -1,
        or no token at all where `lens_are_bounds`; tokens of nobody have slot -1.
        """
        return False

    def reads_once(self, num_repeated_keys: int) -> bool:
        """Whether `plan` treats steps with so many repeated keys (`AttentionBatch`) otherwise than those with none.

        Decode graphs are captured apart for the two; either must serve every step. False, the default, asks nobody to
        count them.
        """
        return False

    def slots(self, layer: int) -> KeyValueSlots | None:
        """Where a kernel of the network may store the planned step's keys and values itself, before `attend`.

        None, the default, if only `forward` stores them.
        """
        return None

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """`forward` without storing; only for backends that give `slots`, after these were filled."""
        raise NotImplementedError(f"{type(self).__name__} gives no slots")

    @abstractmethod
    def forward(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Store the new keys and values, then attend.

        `query` [N, num_heads, head_dim], `key` and `value` [N, num_kv_heads, head_dim], any strides.
        Returns [N, num_heads, head_dim], contiguous.
        """
