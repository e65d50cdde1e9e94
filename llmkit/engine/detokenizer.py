"""Tokens to text, piece by piece, never cutting a character in two."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

NUM_CONTEXT_TOKENS = 8


class StreamDetokenizer:
    """One sequence's text. Some tokenizers decide about a leading space by the token before: hence the context."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._stream: Any = DecodeStream(ids=prompt_token_ids[-NUM_CONTEXT_TOKENS:], skip_special_tokens=True)
        self._held: list[int] = []

    def step(self, token_id: int) -> str:
        """Text that became certain with `token_id`; empty while bytes of a character are missing."""
        text = self._stream.step(self._tokenizer, token_id)
        if text is None:
            self._held.append(token_id)
            return ""
        self._held.clear()
        return str(text)

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD."""
        held, self._held = self._held, []
        return str(self._tokenizer.decode(held, skip_special_tokens=True)) if held else ""
