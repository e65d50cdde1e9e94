"""The embedded default model: a small Llama that writes Python, trained on the standard library's own source.

The folder is the checkpoint. `config.json`, `model.safetensors` and `tokenizer.json` lie beside the code that made
them, so a fresh install has a real model with nothing to download. `README.md` is the model card and `train` the
script; code that *runs* a model does not belong here.
"""

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder that holds the checkpoint; any loader of Hugging Face folders takes it."""
    return Path(__file__).resolve().parent
