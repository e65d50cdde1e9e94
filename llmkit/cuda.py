"""What a CUDA device can do. Imports torch only when asked."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it ends (programmatic dependent launch, from sm_90 on)."""
    return device.type == "cuda" and os.environ.get("TRITON_INTERPRET") != "1" and _capability(device.index) >= 9


@cache
def _capability(index: int | None) -> int:
    import torch

    return torch.cuda.get_device_capability(index)[0]
