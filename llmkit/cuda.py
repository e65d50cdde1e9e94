"""For Triton kernels that start while the one in front of them ends (programmatic dependent launch)."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that may start early on `device`: it takes PDL and waits if that is set."""
    overlaps = can_overlap(device)
    return {"PDL": overlaps, "launch_pdl": overlaps}


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Let the next kernel start, then wait for the one in front to end: nothing it writes may be touched before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it ends: from sm_90 on."""
    return device.type == "cuda" and os.environ.get("TRITON_INTERPRET") != "1" and _capability(device.index) >= 9


@cache
def _capability(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]
