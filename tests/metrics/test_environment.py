"""Where numbers come from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from llmkit.metrics.environment import commit, environment


def test_it_names_versions_and_machine() -> None:
    facts = environment("cpu")
    json.dumps(facts, allow_nan=False)
    assert facts["versions"]["torch"]
    assert facts["versions"]["python"].startswith("3.")
    assert facts["num_cpus"] >= 1
    assert facts["device"] == "cpu"


def test_the_commit_says_whether_files_were_changed(tmp_path: Path) -> None:
    assert commit(tmp_path) is None

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == clean + "+changes"
