"""The tests of the SDPA backend bite: each of these seeded bugs makes it differ from dense attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmkit_attention import sdpa
from llmkit_attention.sdpa import SdpaAttention
from tests.attention.sequences import Sequences
from tests.attention.test_sdpa import MANY, STEPS, run
from tests.testing.test_mutants import plant

BUGS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "queries see the next key": (SdpaAttention._mask, "visible = keys <= positions", "visible = keys <= 1 + positions"),
    "queries do not see themselves": (
        SdpaAttention._mask,
        "keys <= positions[:, :, None]",
        "keys < positions[:, :, None].clamp(min=1)",
    ),
    "the window is one too wide": (SdpaAttention._mask, "[:, :, None] - window", "[:, :, None] - window - 1"),
    "the window is one too narrow": (
        SdpaAttention._mask,
        "> positions[:, :, None] - window",
        "> positions[:, :, None] - max(1, window - 1)",
    ),
    "the window is forgotten": (SdpaAttention._mask, "window is not None", "False"),
    "the mask fits one query head of a group": (
        SdpaAttention._mask,
        "mask.repeat(1, 1, ratio, 1)",
        "mask.repeat_interleave(ratio, 2)",
    ),
    "softcap is forgotten": (SdpaAttention._attend, "spec.softcap is None", "True"),
    "scale is forgotten": (SdpaAttention._attend, "scale=spec.scale", "scale=None if spec.head_dim != 16 else 1.0"),
    "scores are capped before they are scaled": (
        sdpa._softcapped,
        "query, key.transpose(2, 3)) * scale",
        "query, key.transpose(2, 3))",
    ),
    "softcap is not undone": (sdpa._softcapped, "* softcap + mask", "+ mask"),
    "chunks stand at the sequence's start": (
        SdpaAttention._pack,
        "(seq_lens - query_lens)[:, None] + offsets",
        "offsets + 0 * seq_lens[:, None]",
    ),
    "queries of a group overlap": (SdpaAttention._pack, "first[:, None] + offsets", "first[:, None] + offsets // 2"),
    "padding is written": (SdpaAttention._pack, "is_real.flatten()", "torch.roll(is_real, 1, 1).flatten()"),
    "rows of a group read the first rows' blocks": (
        SdpaAttention._plan_group,
        "batch.block_table[index]",
        "batch.block_table[: len(rows)]",
    ),
    "a table is read one block short": (
        SdpaAttention._plan_group,
        "// self.requirements.block_size)\n    if len(rows)",
        "// self.requirements.block_size) - 1 or 1\n    if len(rows)",
    ),
    "keys of the last step are kept": (
        SdpaAttention.forward,
        "pool[0].view(shape).index_copy_(0, self._slots, key)",
        "pass",
    ),
    "values stand one slot off": (
        SdpaAttention.forward,
        "index_copy_(0, self._slots, value)",
        "index_copy_(0, self._slots.roll(1), value)",
    ),
    "query heads meet other heads' keys": (
        SdpaAttention._attend,
        "query.reshape(rows, length, spec.num_kv_heads, ratio, spec.head_dim)",
        "query.reshape(rows, length, ratio, spec.num_kv_heads, spec.head_dim).transpose(2, 3)",
    ),
    "one of several rows of like length attends": (sdpa._group_rows, ".append(row)", "[:] = [row]"),
}


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_the_backend_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, BUGS[bug])
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        run(Sequences(SdpaAttention, MANY), STEPS)
