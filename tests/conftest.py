"""What several rooms' tests need: distributions that exist only in a test, and a place to run commands in."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Threads cost more than they bring on models this small, and workers side by side would fight for the cores. torch
# reads this when it is imported, here and in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# With torch and transformers loaded a full collection looks at half a million objects, which took a tenth of the suite.
# On a machine with a GPU they stay as frequent: there they free what engines hold of its memory.
if not Path("/proc/driver/nvidia/version").exists():
    gc.set_threshold(50_000, 10, 20)

Install = Callable[..., Path]

TINY_MODELS = """
from llmkit import Settings, hookimpl
from llmkit.model.spec import ModelSpec

CONFIG = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True,
}

def tiny(settings):
    return ModelSpec("tiny", config=CONFIG, seed=1)

@hookimpl
def llmkit_register(registry):
    registry.add("model", "tiny", tiny, Settings, "two small layers")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(module, source, name)`: a distribution with one entry point, on the path until the test ends.

    Returns the folder that holds the module and the metadata an installer would leave beside it.
    """
    site, modules = tmp_path / "site", []
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(module: str, source: str, name: str, version: str = "1.0", entry: str | None = None) -> Path:
        (site / f"{module}.py").write_text(source)
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[llmkit]\n{entry or module} = {module}\n")
        modules.append(module)
        importlib.invalidate_caches()
        return site

    yield add
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def tiny_model(install: Install) -> Path:
    """A distribution that registers `model=tiny`, random weights without a tokenizer; returns its folder."""
    return install("tiny_models", TINY_MODELS, "llmkit-tiny-models")


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory; afterwards the root logger is as before and Hydra's log files are closed."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def make_llm() -> Iterator[Callable[..., Any]]:
    """`make_llm(model, ...)` is `LLM(...)` in float64 with small blocks, by default over a tiny llama of token ids.

    After the test every one that was made must have given back all blocks and slots.
    """
    from llmkit import LLM
    from tests.tiny_llm import BLOCK_SIZE, check_nothing_left, tiny

    made = []

    def make(model: Any = None, **options: Any) -> LLM:
        llm = LLM(model or tiny(), **{"dtype": "float64", "block_size": BLOCK_SIZE, **options})
        made.append(llm)
        return llm

    yield make
    for llm in made:
        check_nothing_left(llm)


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The `model` argument of a checkpoint with a tokenizer, see `tests.tiny_llm.SCRIPT`."""
    from tests.tiny_llm import save_speaking_model

    folder = tmp_path_factory.mktemp("speaker")
    save_speaking_model(folder)
    return {"name": "hf", "path": str(folder)}
