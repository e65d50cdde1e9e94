"""`llmkit plugins`: who brought what, what failed, and the options of one part."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit import EngineSettings, load_plugins
from llmkit.cli import main
from llmkit.config import defaults

Install = Callable[..., Path]


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def row(text: str, *cells: str) -> str:
    """The only line of a table that has all these cells."""
    lines = [(line, [cell.strip() for cell in line.split("│")]) for line in text.splitlines()]
    (found,) = [line for line, has in lines if all(cell in has for cell in cells)]
    return found


def test_every_component_is_listed_with_owner_and_doc(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "plugins")
    for component in load_plugins()[0].components():
        assert component.doc in row(text, component.kind, component.name, component.owner)


def test_foreign_and_failed_plugins_are_listed(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    source = "from llmkit import ContinuousBatching, hookimpl\n@hookimpl\ndef llmkit_register(registry):\n"
    install("foreign_good", f"{source}    registry.add_scheduler('good', ContinuousBatching)", "llmkit-good", "4.2")
    install("foreign_bad", "1 / 0", "llmkit-bad")
    text = output(capsys, "plugins")
    assert row(text, "scheduler", "good", "llmkit-good 4.2")
    assert "plugin llmkit-bad:foreign_bad failed: ZeroDivisionError: division by zero" in text


def test_plugins_kept_out_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMKIT_BLOCK", "llmkit:caches")
    text = output(capsys, "plugins")
    assert "plugin llmkit:caches is kept out by LLMKIT_BLOCK" in text and "contiguous" not in text


@pytest.mark.parametrize("name", ["priority", "scheduler/priority", "scheduler=priority"])
def test_show_gives_defaults_bounds_and_descriptions(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "plugins", "show", name)
    assert text.startswith("scheduler=priority of llmkit ")
    line = row(text, "scheduler.ageing_seconds", "10.0")
    assert "number, above 0.0" in line and "one level of priority" in line
    assert "integer, 1 to 4096 or null" in row(text, "scheduler.max_num_seqs", "null")


def test_show_a_section_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "plugins", "show", "engine")
    for option, value in defaults(EngineSettings, "required").items():
        assert row(text, f"engine.{option}", "null" if value is None else str(value))


def test_show_says_what_is_required_and_what_has_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert row(output(capsys, "plugins", "show", "hf"), "model.path", "required")
    text = output(capsys, "plugins", "show", "cache/contiguous")
    assert text.startswith("cache=contiguous of llmkit ") and text.endswith("\nno options\n")
    assert text.count("\n") == 2, "a table of nothing is drawn"


def test_same_name_of_two_kinds_shows_both(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    source = "from llmkit import ContinuousBatching, hookimpl\n@hookimpl\ndef llmkit_register(registry):\n"
    install("foreign_twin", f"{source}    registry.add_scheduler('paged', ContinuousBatching)", "llmkit-twin")
    text = output(capsys, "plugins", "show", "paged")
    assert "scheduler=paged of llmkit-twin 1.0" in text and "cache=paged of llmkit " in text


def test_a_group_is_not_a_part_but_names_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "show", "cache"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "llmkit: cache is a group: show one of contiguous, paged, radix\n"


def test_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "show", "pagd"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("llmkit: unknown part 'pagd'; did you mean 'paged'? (choices: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["plugns"],
            "invalid choice: 'plugns' (choose from 'run', 'plugins', 'generate', 'completion') (see llmkit --help)",
        ),
        (["completion", "tcsh"], "(choose from 'bash', 'zsh', 'fish') (see llmkit completion --help)"),
        ([], "the following arguments are required: COMMAND (see llmkit --help)"),
        (["plugins", "show"], "the following arguments are required: name (see llmkit plugins show --help)"),
        (["plugins", "--json"], "unrecognized arguments: --json (see llmkit plugins --help)"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("llmkit: ") and err.endswith(f"{says}\n") and err.count("\n") == 1


def test_the_package_runs_as_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["llmkit", "plugins", "show", "sdpa"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("llmkit", run_name="__main__")
    assert ended.value.code == 0 and "attention=sdpa of llmkit" in capsys.readouterr().out
