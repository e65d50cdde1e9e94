"""The byte-level BPE tokenizer: how Python text is cut before merging, trained and saved for both of its readers.

`tokenizer.json` is what the `tokenizers` library reads; `tokenizer_config.json` lets transformers load the folder.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["END", "END_ID", "encode", "learn", "save"]

END = "<|endoftext|>"
"""Ends every document, so it is the end-of-sequence token; what follows one starts afresh, so it is `bos` too."""
END_ID = 0  # the trainer numbers special tokens first

# A merge never crosses these cuts. A line break keeps the indentation behind it, so going to a new line of a block
# is one token; an identifier is one piece, underscores included, so `__init__` can become one token.
PIECES = r"(?:\r?\n)+[ \t]*| ?[\p{L}_][\p{L}\p{N}_]*| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|[ \t]+(?=[ \t])|\s+"
OPENERS = re.compile(
    r"^[ \t]*(?:async )?(?:def|class|import|from|for|if|while|with|return|raise|assert|del) ", re.MULTILINE
)


def learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on `texts`. Any UTF-8 text survives encoding and decoding unchanged, whatever was trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` that transformers wants beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, texts: Sequence[str], mean_piece: int = 0, seed: int = 0) -> list[int]:
    """Token ids of all `texts`, each ended by `END`.

    With `mean_piece`, every text is cut at random places about that many characters apart and the pieces are encoded
    one by one. A prompt may stop in the middle of a word or behind a space, where running text never has a token
    boundary; a model that has seen such boundaries continues such a prompt well. Half of the statements that start with
    a word of `OPENERS` are cut behind that word and its space, as in a prompt like "def ".
    """
    rng = random.Random(seed)
    pieces = [list(_cut(text, mean_piece, rng)) for text in texts]
    encoded = iter(tokenizer.encode_batch([piece for cut in pieces for piece in cut]))
    ids: list[int] = []
    for cut in pieces:
        for _ in cut:
            ids.extend(next(encoded).ids)
        ids.append(END_ID)
    return ids


def _cut(text: str, mean_piece: int, rng: random.Random) -> Iterator[str]:
    cuts = {match.end() for match in OPENERS.finditer(text) if rng.random() < 0.5} if mean_piece else set()
    at = 0
    while mean_piece and (at := at + 1 + int(rng.expovariate(1 / mean_piece))) < len(text):
        cuts.add(at)
    start = 0
    for stop in sorted(cuts - {len(text)}):
        yield text[start:stop]
        start = stop
    yield text[start:]
