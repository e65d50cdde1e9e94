"""`llmkit generate "def main("`: one prompt, its continuation streamed to standard output as it comes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from llmkit.config import choose, validate
from llmkit.engine.settings import EngineSettings
from llmkit.errors import RequestError
from llmkit.plugins import load_plugins, naming_plugins
from llmkit.types import SamplingParams

if TYPE_CHECKING:
    from llmkit.llm import LLM


def generate(options: argparse.Namespace) -> int:
    """Everything is validated before torch is imported. RequestError if the prompt cannot run."""
    wanted = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")}
    params = validate(SamplingParams, wanted)
    engine = validate(EngineSettings, {"dtype": options.dtype, "device": options.device})
    registry, _ = load_plugins()
    model = choose(registry, "model", _model(options.model))
    from llmkit.llm import LLM

    with naming_plugins(registry):
        _stream(LLM(model, engine=engine), options.prompt, params)
    return 0


def _stream(llm: LLM, prompt: str, params: SamplingParams) -> None:
    shown = prompt
    for piece in llm.stream([prompt], params):
        if piece.error is not None:
            raise RequestError(piece.error)
        sys.stdout.write(shown + piece.text)
        sys.stdout.flush()
        shown = ""
    sys.stdout.write("\n")


def _model(name: str) -> str | dict[str, Any]:
    """A registered name, or a folder or hub id, both of which hold a slash."""
    return {"name": "hf", "path": name} if "/" in name else name
