"""For Triton kernels: starting while the one in front ends (programmatic dependent launch), and storing in few bits."""

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


@triton.jit
def narrowed(x, TYPE: tl.constexpr):
    """`x` as TYPE; beyond what e4m3 holds it becomes the nearest number that it does, and NaN stays NaN."""
    if TYPE == tl.float8e4nv:  # noqa: SIM300
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    return x.to(TYPE)


def holds_e4m3(device: torch.device) -> bool:
    """Whether kernels on `device` convert from and to e4m3: from sm_89 on."""
    return device.type != "cuda" or _capability(device.index) >= (8, 9)


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it ends: from sm_90 on."""
    return device.type == "cuda" and os.environ.get("TRITON_INTERPRET") != "1" and _capability(device.index) >= (9, 0)


def is_hopper(device: torch.device) -> bool:
    """Whether `device` runs kernels that are written for sm_90 alone."""
    return device.type == "cuda" and os.environ.get("TRITON_INTERPRET") != "1" and _capability(device.index) == (9, 0)


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
