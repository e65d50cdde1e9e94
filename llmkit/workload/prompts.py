"""What prompts are made of: random token ids, or cuts from a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmkit.errors import ConfigError
from llmkit.workload.protocol import ModelBounds

Draw = Callable[[int], tuple[int, ...]]


def prompt_source(prompt_file: str, bounds: ModelBounds, rng: np.random.Generator) -> Draw:
    """A function that draws a prompt of the given length: from the text file, or random ids if it is empty."""
    if not prompt_file:
        return lambda length: tuple(rng.integers(0, bounds.vocab_size, size=length).tolist())
    tokens = _encode_file(prompt_file, bounds)

    def cut(length: int) -> tuple[int, ...]:
        start = int(rng.integers(len(tokens)))
        return tuple(tokens[(start + offset) % len(tokens)] for offset in range(length))

    return cut


def read_text(prompt_file: str) -> str:
    """What the file holds; ConfigError if it cannot be read."""
    try:
        return Path(prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"workload.prompt_file={prompt_file!r} cannot be read: {error}") from None


def _encode_file(prompt_file: str, bounds: ModelBounds) -> list[int]:
    if bounds.encode is None:
        raise ConfigError(f"workload.prompt_file={prompt_file!r}: the model has no tokenizer to encode it with")
    tokens = bounds.encode(read_text(prompt_file))
    if not tokens:
        raise ConfigError(f"workload.prompt_file={prompt_file!r} holds no text")
    return tokens
