"""The console script `llmkit`. Each subcommand has its file; what it needs is imported when it runs, torch last."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from llmkit.errors import LlmkitError, did_you_mean
from llmkit.run import have_output, output_failed
from llmkit.run import main as run

USAGE_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for anything the user can put right, 130 after Ctrl-C."""
    have_output()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["--debug", "run"]:
        return run([*words[2:], "--debug"])
    if words[:1] == ["run"]:
        return run(words[1:])
    if words[:1] == ["__complete"]:
        from llmkit.cli.completion import complete

        return complete(" ".join(words[1:]))
    top = parser()
    options, unknown = top.parse_known_args(words)
    if unknown:
        _refuse(options.command, unknown)
    try:
        code = _dispatch(options)
        print(end="", flush=True)
        return code
    except LlmkitError as error:
        if options.debug:
            raise
        print(f"llmkit: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("\nllmkit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        return output_failed(error, options.debug)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error, and where the valid arguments are listed."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"llmkit: {message} (see {self.prog} --help)\n")


def _dispatch(options: argparse.Namespace) -> int:
    if options.command == "plugins":
        from llmkit.cli.listing import list_plugins, show_plugin

        return show_plugin(options.name) if options.action == "show" else list_plugins()
    if options.command == "generate":
        from llmkit.cli.generate import generate

        return generate(options)
    from llmkit.cli.completion import script

    print(script(options.shell), end="")
    return 0


def _refuse(command: str, unknown: Sequence[str]) -> NoReturn:
    """Exit over arguments that `command` does not have; a flag with the one that it resembles."""
    if "=" in unknown[0] and not unknown[0].startswith("-"):
        hint = "; only `llmkit run` takes GROUP=NAME and GROUP.OPTION=VALUE"
    else:
        from llmkit.cli.completion import FLAGS

        hint = did_you_mean(unknown[0].partition("=")[0], FLAGS.get(command, ()))
    Parser(prog=f"llmkit {command}").error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def parser() -> argparse.ArgumentParser:
    """Every subcommand but `run`, whose arguments are Hydra's and are passed on untouched."""
    top = Parser(prog="llmkit", description="An LLM inference engine built from replaceable parts.")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top.add_argument("--version", action="version", version=f"llmkit {_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    debug = Parser(add_help=False)  # it may stand behind the command as well
    debug.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    commands.add_parser("run", help="benchmark one composition, or sweep over many (llmkit run --help)", add_help=False)
    of_plugins = "list what is installed; `plugins show NAME` for its options"
    plugins = commands.add_parser("plugins", help=of_plugins, parents=[debug])
    actions = plugins.add_subparsers(dest="action", metavar="show")
    show = actions.add_parser("show", help="options of one part: defaults, allowed values, meaning", parents=[debug])
    show.add_argument("name", help="such as continuous, cache/paged, engine or sampling")
    of_generate = "continue one prompt, streaming to standard output"
    _add_generate(commands.add_parser("generate", help=of_generate, parents=[debug]))
    completion = commands.add_parser("completion", help="print the completion script of a shell", parents=[debug])
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return top


def _version() -> str:
    """Of the installed distribution; `pyproject.toml` is the one place that says it."""
    try:
        return version("llmkit")
    except PackageNotFoundError:
        return "(not installed)"


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", help="text to continue")
    command.add_argument("--model", default="embedded", help="a name from `llmkit plugins`, or a folder or hub id")
    command.add_argument("--max-tokens", type=int, default=64)
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--seed", type=int)
    command.add_argument("--stop", action="append", default=[], help="stop before this text; may be repeated")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
