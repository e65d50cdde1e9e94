"""Options of the Triton backend. Imports neither torch nor triton, so that listing them costs nothing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmkit.interfaces.settings import Settings


class FlashSettings(Settings):
    """Options of the Triton backend."""

    kv_dtype: Literal["auto", "fp8"] = Field(
        "auto", description="how keys and values are stored: as the model computes, or as e4m3 in half the memory"
    )
