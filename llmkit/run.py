"""`python -m llmkit.run scheduler=continuous cache=paged`: play one composed workload, or sweep over many.

Only what an exit code needs: imports that take a second happen inside `main`, so that Ctrl-C is quiet at any time.
Standard output gets tables; progress, logs and where the files are go to standard error.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmkit.errors import LlmkitError

USAGE_ERROR, INTERRUPTED = 2, 130
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def main(argv: Sequence[str] | None = None) -> int:
    """Compose, validate, run. Returns 0, 2 if anything asked for was wrong or nothing completed, 130 after Ctrl-C."""
    have_output()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("HYDRA_FULL_ERROR") == "1"
    words = [word for word in words if word != "--debug"]
    folders: list[Path] = []
    try:
        from llmkit.runner import run

        num_failed = run(words, folders)
        print(end="", flush=True)
    except LlmkitError as error:
        if debug:
            raise
        _say(str(error))
        return USAGE_ERROR
    except KeyboardInterrupt:
        _say(_interrupted(folders))
        return INTERRUPTED
    except OSError as error:
        return output_failed(error, debug)
    if num_failed:
        _say(f"{num_failed} of the sweep's runs failed, see above")
        return USAGE_ERROR
    return 0


def have_output() -> None:
    """Where standard output was closed before the start, as by `>&-`, what goes there goes nowhere."""
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def output_failed(error: OSError, debug: bool) -> int:
    """Exit code 0 where standard output was closed, as by `| head`; 2, and one line, where a full disk or a folder
    takes nothing. What is still buffered goes nowhere. Other errors, and with `debug` the second, are raised again.
    """
    is_closed = isinstance(error, BrokenPipeError)
    if not is_closed and (debug or error.errno not in UNWRITABLE):
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if is_closed:
        return 0
    _say(f"cannot write {error.filename or 'standard output or a file of the run'}: {error.strerror}")
    return USAGE_ERROR


def _interrupted(folders: Sequence[Path]) -> str:
    """What Ctrl-C left behind in the last of the runs that were begun."""
    if not folders:
        return "interrupted before anything ran"
    folder = os.path.relpath(folders[-1])
    if (folders[-1] / "result.json").is_file():
        return f"interrupted; what was measured so far is in {folder}"
    return f"interrupted before anything was measured; run folder: {folder}"


def _say(message: str) -> None:
    print(f"llmkit: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
