"""What describes a model before it is loaded. Torch-free, so that catalogues can be listed cheaply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelSpec:
    """Either `path`, a folder or hub id with safetensors, or `config`, transformers config fields with `model_type`
    from which a model with random weights is built from `seed`."""

    name: str
    path: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def key(self) -> str:
        """Equal keys mean equal weights."""
        return repr((self.path, sorted(self.config.items(), key=str), self.seed))
