"""Text piece by piece: never a broken character, never a failure, and in the end what decoding at once gives."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from llmkit.engine.detokenizer import NUM_CONTEXT_TOKENS, StreamDetokenizer

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
PIECES = ["▁", "▁a", "a", "b", "é", "▁€", "x▁y"]


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """Decodes as Llama 2, Mistral and Gemma do: a run of byte tokens that is no UTF-8 becomes one U+FFFD per byte."""
    vocab = BYTES | {piece: 256 + number for number, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token=None))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def pieces(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    stream = StreamDetokenizer(tokenizer, prompt)
    return [*(stream.step(token) for token in output), stream.flush()]


def test_characters_come_whole(byte_fallback: Tokenizer) -> None:
    euro = list("€".encode())
    assert pieces(byte_fallback, [258], [*euro, 259, *euro]) == ["", "", "€", "b", "", "", "€", ""]


def test_the_prompt_decides_about_the_first_space(byte_fallback: Tokenizer) -> None:
    assert pieces(byte_fallback, [], [257]) == ["a", ""]
    assert pieces(byte_fallback, [258], [257]) == [" a", ""]


@pytest.mark.parametrize("seed", range(20))
def test_text_of_valid_output_is_that_of_decoding_at_once(byte_fallback: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    words = [list("€".encode()), list("é".encode()), [257], [258], [262], [0x41]]
    prompt, output = ([token for word in rng.choices(words, k=k) for token in word] for k in (6, 12))
    context = prompt[-NUM_CONTEXT_TOKENS:]
    before = byte_fallback.decode(context).removesuffix("\ufffd")
    whole = byte_fallback.decode(context + output)
    assert whole.startswith(before)
    assert "".join(pieces(byte_fallback, prompt, output)) == whole.removeprefix(before)


def test_whatever_a_model_says_has_a_text(byte_fallback: Tokenizer) -> None:
    """A bad byte turns its whole run into U+FFFD, also characters that have been shown: those stay shown."""
    rng = random.Random(0)
    for _ in range(1000):
        prompt, output = ([rng.randrange(263) for _ in range(rng.randint(1, 12))] for _ in range(2))
        assert "".join(pieces(byte_fallback, prompt, [*output, 259])).endswith("b")


def test_a_shown_character_is_not_taken_back(byte_fallback: Tokenizer) -> None:
    assert "".join(pieces(byte_fallback, [258], [0x53, 0xFD, 0xF6, 259])) == "S\ufffd\ufffdb"
