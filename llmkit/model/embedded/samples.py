"""Look at what the model writes: continuations of a few prompts, and the share of them that is Python.

    python -m llmkit.model.embedded.samples [FOLDER]

It runs the transformers implementation on the CPU, so the figures judge the weights and not llmkit's engine.
"""

import argparse
import codeop
import warnings
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, set_seed

from llmkit.model.embedded import path

__all__ = ["Writer", "main", "verdict"]

PROMPTS = ("def ", "import ", "class ", "    def __init__(self", "for i in range(", "if __name__ == ")
TEMPERATURE = 0.7
NUM_SAMPLES = 200


class Writer:
    """A checkpoint folder with its tokenizer, on the CPU in float32."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train(False)

    def write(self, prompt: str, num_tokens: int, temperature: float = 0.0, n: int = 1) -> list[str]:
        """`n` continuations, the prompt included, each up to `num_tokens` tokens or the end of the document."""
        end = self._model.config.eos_token_id
        inputs = self._tokenizer([prompt] * n, return_tensors="pt", return_token_type_ids=False)
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = self._model.generate(**inputs, max_new_tokens=num_tokens, pad_token_id=end, **how)
        texts: list[str] = self._tokenizer.batch_decode(out, skip_special_tokens=True)
        return texts


def verdict(text: str) -> str:
    """`complete`, `unfinished` (right so far, a bracket, string or block is open) or `invalid` Python.

    The last line is dropped first: the token limit may have cut it anywhere. The rest is compiled, never run.
    """
    lines, _, _ = text.rpartition("\n")
    if not lines.strip():
        return "unfinished"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "complete" if codeop.compile_command(lines + "\n", symbol="exec") else "unfinished"
        except (SyntaxError, ValueError, OverflowError):
            return "invalid"


def main() -> None:
    """Print the samples of the model card and its count of verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=path(), help="a checkpoint (default: the embedded one)")
    writer = Writer(parser.parse_args().folder)
    set_seed(0)
    for prompt in PROMPTS:
        for temperature in (0.0, TEMPERATURE):
            print(f"--- {prompt!r}, temperature {temperature}")
            print(writer.write(prompt, 96, temperature)[0])
    for prompt in ("def ", "class "):
        verdicts = Counter(verdict(text) for text in writer.write(prompt, 128, TEMPERATURE, NUM_SAMPLES))
        print(f"--- {prompt!r}, 128 tokens, temperature {TEMPERATURE}, {NUM_SAMPLES} samples: {dict(verdicts)}")


if __name__ == "__main__":
    main()
