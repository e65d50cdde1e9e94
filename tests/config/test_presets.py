"""Files of presets: those of `conf/` compose, and what is wrong in one of a user's own is told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit import ConfigError, load_plugins
from llmkit.compose import Job, run_hydra, store
from llmkit.config import conf_dir, resolve

GLOBAL = "# @package _global_\n"


def jobs(*argv: str) -> list[Job]:
    """Every job that `argv` composes."""
    found: list[Job] = []
    registry, _ = load_plugins()
    store(registry)
    run_hydra(argv, registry, found.append)
    return found


def test_every_preset_composes_and_validates(workdir: Path) -> None:
    presets = sorted(path for path in conf_dir().rglob("*.yaml") if path.parent != conf_dir())
    assert presets
    for path in presets:
        group = path.parent.relative_to(conf_dir()).as_posix()
        plus = "+" if group == "experiment" else ""
        for job in jobs(f"{plus}{group}={path.stem}"):
            resolve(load_plugins()[0], job.raw)


def test_conf_holds_no_component_options() -> None:
    names = {path.parent.name for path in conf_dir().rglob("*.yaml")}
    assert names <= {"conf", "engine", "sampling", "experiment"}


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        (
            f"{GLOBAL}workload: batch",
            "workload: 'batch' stands where its options belong; a preset chooses under `defaults:` with `- override "
            "/workload: batch`",
        ),
        (f"{GLOBAL}engine: exact", "under `defaults:` with `- override /engine: exact`"),
        (f"{GLOBAL}defaults:\n  - cache: radix", "a preset chooses under `defaults:` with `- override /cache: radix`"),
        (f"{GLOBAL}defaults:\n  - override cache: radix", "under `defaults:` with `- override /cache: NAME`"),
        ("workload:\n  seed: 1", "a file of presets for a whole run begins with the line: # @package _global_"),
        ("workload: [", "mine.yaml"),
        ("\xff", "a config file is not in UTF-8: 'utf-8' codec can't decode byte 0xff in position 0"),
    ],
)
def test_a_wrong_preset_is_told_in_one_line(workdir: Path, preset: str, says: str) -> None:
    folder = workdir / "own/experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(preset, encoding="latin-1")
    with pytest.raises(ConfigError) as caught:
        jobs("--config-dir", "own", "+experiment=mine")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in workdir.iterdir()] == ["own"]
