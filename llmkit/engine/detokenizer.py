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
        context = prompt_token_ids[-NUM_CONTEXT_TOKENS:]
        self._stream: Any = DecodeStream(ids=context, skip_special_tokens=True)
        # A context that ends inside a character does not count as seen: the stream repeats it with its first piece.
        seen = tokenizer.decode(context, skip_special_tokens=True)
        self._repeated = seen if seen.endswith("\ufffd") else ""
        self._held: list[int] = []

    def step(self, token_id: int) -> str:
        """Text that became certain with `token_id`; empty while bytes of a character are missing."""
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # "invalid prefix", of no type of its own
            return self._start_again(token_id)
        if text is None:
            self._held.append(token_id)
            return ""
        self._held.clear()
        first, self._repeated = _num_common(self._repeated, text), ""
        return str(text)[first:]

    def _start_again(self, token_id: int) -> str:
        """A bad byte has changed how characters before it decode. They have been shown, so go on behind them."""
        held, self._held = self._held, []
        self._stream = DecodeStream(skip_special_tokens=True)
        return "".join([self.step(token) for token in (*held, token_id)])

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD."""
        held, self._held = self._held, []
        return str(self._tokenizer.decode(held, skip_special_tokens=True)) if held else ""


def _num_common(one: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (left, right) in pairs if left != right), min(len(one), len(other)))
