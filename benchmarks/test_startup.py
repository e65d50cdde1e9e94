"""How long the light commands take, process start included. The project's limit: under 0.7 s."""

import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

LIMIT_SECONDS = 0.7
COMMANDS = [
    ["--help"],
    ["plugins"],
    ["plugins", "show", "continuous"],
    ["completion", "bash"],
    ["__complete", "llmkit run scheduler=continuous scheduler."],
]
CODE = "import sys; from llmkit.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_answers_at_once(benchmark: BenchmarkFixture, argv: list[str]) -> None:
    """A fresh interpreter runs the command."""

    def run() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([sys.executable, "-c", CODE, *argv], capture_output=True, check=True)

    assert benchmark.pedantic(run, rounds=5, warmup_rounds=1).stdout
    if benchmark.enabled:
        assert benchmark.stats.stats.min < LIMIT_SECONDS
