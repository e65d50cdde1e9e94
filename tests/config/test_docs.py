"""The pages about configuration and plugins are true: their commands compose, their code runs, nothing is left out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmkit import ConfigError, EngineSettings, load_plugins
from llmkit.compose import Job, run_hydra, store
from llmkit.config import KINDS, SECTIONS, resolve

DOCS = Path(__file__).parents[2] / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text()
WRITING = (DOCS / "writing-a-plugin.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


COMMANDS = [
    line for block in blocks(CONFIGURATION, "sh") for line in block.splitlines() if line.startswith("llmkit run")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_compose_and_validate(line: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry, _ = load_plugins()
    store(registry)
    found: list[Job] = []
    argv = shlex.split(line)[2:]
    if "--help" in argv:
        with pytest.raises(SystemExit):
            run_hydra(argv, registry, found.append)
        return
    run_hydra(argv, registry, found.append)
    assert bool(found) != ("--cfg" in argv)
    for job in found:
        resolve(registry, job.raw)


def test_the_page_covers_every_group_and_engine_option() -> None:
    assert len(COMMANDS) > 8
    for name in (*KINDS, *SECTIONS, *EngineSettings.model_fields):
        assert f"`{name}`" in CONFIGURATION, name
    for component in load_plugins()[0].components():
        for option in component.settings.model_fields if component.kind == "cache" else ():
            assert f"| `cache.{option}` | `{component.name}` |" in CONFIGURATION, option


def test_errors_are_quoted_as_they_are(workdir: Path) -> None:
    registry, _ = load_plugins()
    store(registry)
    quoted = [line for line in CONFIGURATION.splitlines() if line.startswith("llmkit: ")]
    typed = ("scheduler=contnuous", "scheduler.max_num_seqs=0", "engine.sed=1", "attention.kv_dtype=fp8")
    for argument, line in zip(typed, quoted, strict=True):
        with pytest.raises(ConfigError) as caught:
            run_hydra([argument], registry, lambda job: resolve(registry, job.raw) and None)
        expected = line.removeprefix("llmkit: ").removesuffix("...)")
        assert str(caught.value).startswith(expected)


def test_code_of_the_plugin_page_runs() -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    found = blocks(WRITING, "python")
    assert len(found) == 6
    for block in found:
        exec(block, namespace)
    registry, _ = load_plugins([type("Page", (), {"llmkit_register": staticmethod(namespace["llmkit_register"])})()])
    assert registry.get("scheduler", "shortest_first").doc == "The shortest prompt is admitted first."
    load_plugins([namespace["CountReasons"]()])  # type: ignore[operator]
    registry, _ = load_plugins([namespace["Policies"]()])  # type: ignore[operator]
    assert "mru" in registry.names("eviction")
