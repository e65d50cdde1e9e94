"""Completion: what Tab offers, and that a real shell gets it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit import load_plugins
from llmkit.cli import main
from llmkit.cli.completion import candidates
from llmkit.config import conf_dir
from llmkit.registry import KINDS

Install = Callable[..., Path]


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("llmkit ", ["completion", "generate", "plugins", "run"]),
        ("llmkit p", ["plugins"]),
        ("llmkit --de", ["--debug"]),
        ("llmkit completion ", ["bash", "fish", "zsh"]),
        ("llmkit plugins s", ["show"]),
        ("llmkit plugins show conti", ["contiguous", "continuous"]),
        ("llmkit plugins show eng", ["engine"]),
        ("llmkit generate --mod", ["--model"]),
        ("llmkit generate --model emb", ["embedded"]),
        ("llmkit generate ", []),
        ("llmkit run sch", ["scheduler.", "scheduler="]),
        ("llmkit run plo", ["plots_dir="]),
        ("llmkit run --mu", ["--multirun"]),
        ("llmkit run cache=", ["cache=contiguous", "cache=paged", "cache=radix"]),
        ("llmkit run attention=a", ["attention=auto"]),
        ("llmkit run -m cache=paged,", ["cache=paged,contiguous", "cache=paged,paged", "cache=paged,radix"]),
        ("llmkit run engine=", ["engine=default", "engine=exact"]),
        ("llmkit run engine.dev", ["engine.device="]),
        ("llmkit run engine.device=", ["engine.device=auto", "engine.device=cpu", "engine.device=cuda"]),
        ("llmkit run engine.fused=", ["engine.fused=false", "engine.fused=true"]),
        ("llmkit run engine.seed=", []),
        ("llmkit run scheduler=priority scheduler.age", ["scheduler.ageing_seconds="]),
        ("llmkit run scheduler=static scheduler.age", []),
        ("llmkit run scheduler.age", ["scheduler.ageing_seconds="]),
        ("llmkit run nope.", []),
        ("llmkit run nope=", []),
        ("llmkit run =", []),
    ],
)
def test_offers(line: str, offers: list[str]) -> None:
    assert candidates(line) == offers


def test_every_component_and_preset_is_offered(install: Install) -> None:
    source = "from llmkit import ContinuousBatching, hookimpl\n@hookimpl\ndef llmkit_register(registry):\n"
    install("foreign_tab", f"{source}    registry.add_scheduler('lastly', ContinuousBatching)", "llmkit-tab")
    assert "scheduler=lastly" in candidates("llmkit run scheduler=")
    for component in (one for one in load_plugins()[0].components() if one.kind in KINDS):
        assert f"{component.kind}={component.name}" in candidates(f"llmkit run {component.kind}=")
    presets = [path.stem for path in sorted((conf_dir() / "experiment").glob("*.yaml"))]
    assert presets and candidates("llmkit run +experiment=") == [f"+experiment={name}" for name in presets]


def test_refused_plugins_offer_nothing_and_print_nothing(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("foreign_tab_b", "x = 1", "llmkit-tab-b")
    assert main(["__complete", "llmkit run scheduler="]) == 1
    assert capsys.readouterr() == ("", "")


def test_bash_completes_behind_the_equals_sign(tmp_path: Path) -> None:
    script = subprocess.run([llmkit(), "completion", "bash"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "completion.bash").write_text(script)
    assert bash(tmp_path, "llmkit run sched") == ["scheduler.", "scheduler="]
    assert bash(tmp_path, "llmkit run cache=") == ["contiguous", "paged", "radix"]
    assert bash(tmp_path, "llmkit run -m cache=paged,con") == ["paged,contiguous"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_ask_llmkit(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "llmkit __complete" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def llmkit() -> str:
    """The installed console script."""
    return str(Path(sys.executable).with_name("llmkit"))


def bash(folder: Path, line: str) -> list[str]:
    """What bash would offer after `line` and Tab."""
    code = f'source completion.bash; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; _llmkit; '
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    environment = {**os.environ, "PATH": f"{Path(llmkit()).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()
