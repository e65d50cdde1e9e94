"""The rules of the house, held: size of rooms, direction of imports, what no code here may contain."""

import ast
import inspect
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import get_type_hints

import grimp
import pytest

import llmkit
from llmkit import hookspecs

ROOT = Path(__file__).parents[1]
PACKAGES = ("llmkit", "llmkit_schedulers", "llmkit_caches", "llmkit_attention")
PRODUCT = sorted([*ROOT.glob("llmkit/**/*.py"), *ROOT.glob("plugins/**/*.py")])
PYTHON = sorted([*PRODUCT, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("docs/**/*.py")])
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".cfg", ".json", ".txt", ""}

# Choices are made without looking at a clock, drawing a number or touching a tensor.
PURE = [
    *ROOT.glob("plugins/llmkit_schedulers/*.py"),
    *ROOT.glob("plugins/llmkit_caches/*.py"),
    *(ROOT / "llmkit" / name for name in ("batching.py", "types.py", "registry.py", "hookspecs.py")),
    *(ROOT / "llmkit/interfaces" / name for name in ("scheduler.py", "cache.py", "settings.py", "executor.py")),
    *(
        ROOT / "llmkit/engine" / name
        for name in ("planner.py", "scheduling.py", "residency.py", "progress.py", "forks.py")
    ),
]
IMPURE = {"time", "datetime", "random", "secrets", "uuid", "torch", "numpy", "transformers", "os", "threading"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def project_files() -> list[Path]:
    """Every text file of the project: what git tracks or would track, or everything where there is no git."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        paths = [ROOT / name for name in names]
    except (OSError, subprocess.CalledProcessError):
        folders = ("llmkit", "plugins", "conf", "benchmarks", "tests", "docs")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    return [path for path in paths if path.is_file() and path.suffix in TEXT_SUFFIXES]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the packages whether or not they are installed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def test_no_file_is_longer_than_300_lines() -> None:
    long = {name_of(path): n for path in PYTHON if (n := len(path.read_text("utf-8").splitlines())) > 300}
    assert not long


def test_the_median_room_has_less_than_100_lines() -> None:
    sizes = [len(path.read_text("utf-8").splitlines()) for path in PRODUCT]
    assert statistics.median(sizes) < 100, f"median {statistics.median(sizes)} over {len(sizes)} files"


def test_no_function_is_longer_than_40_lines_and_no_kernel_than_80() -> None:
    """The loop of a kernel cannot be cut without passing its registers around, and its signature alone takes ten."""
    long = {
        f"{name_of(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in PYTHON
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > (80 if is_kernel(node) else 40)
    }
    assert not long


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(d).partition("(")[0] in ("triton.jit", "gluon.jit") for d in function.decorator_list)


def test_import_contracts_are_kept() -> None:
    script = "from importlinter.cli import lint_imports_command as run; run()"
    done = python("-c", script, "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [6-9] kept, 0 broken", done.stdout), done.stdout


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def test_no_import_cycles(graph: grimp.ImportGraph) -> None:
    """TYPE_CHECKING imports included; `graphlib` raises a CycleError that names the cycle."""
    dependencies = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(dependencies) > 40
    TopologicalSorter(dependencies).prepare()


def test_no_room_of_the_core_imports_the_root(graph: grimp.ImportGraph) -> None:
    """`llmkit` re-exports the rooms for users and plugins; a room that imported it would go round in a circle."""
    core = {name for name in graph.find_modules_that_directly_import("llmkit") if name.startswith("llmkit.")}
    assert not core


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_choices_look_at_no_clock_number_generator_or_tensor(path: Path) -> None:
    assert not {name for name in imported(parse(path)) if name.partition(".")[0] in IMPURE}


def test_listing_and_planning_never_import_torch() -> None:
    rooms = ["llmkit", "llmkit.testing", "llmkit.engine.engine", "llmkit.hookspecs", *PACKAGES[1:]]
    lines = [f"import {room}" for room in rooms]
    done = python("-c", "\n".join([*lines, "import sys", "assert 'torch' not in sys.modules, 'torch is imported'"]))
    assert done.returncode == 0, done.stderr


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name_of(path) for path in PRODUCT if path.read_text("utf-8").strip() and not ast.get_docstring(parse(path))
    ]
    assert not silent


def test_every_public_class_and_function_of_the_contracts_is_documented() -> None:
    contracts = [*ROOT.glob("llmkit/interfaces/*.py"), *ROOT.glob("llmkit/testing/*.py"), ROOT / "llmkit/batching.py"]
    silent = [
        f"{name_of(path)}:{node.lineno} {node.name}"
        for path in contracts
        for node in parse(path).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_" and not ast.get_docstring(node)
    ]
    assert not silent


def test_names_say_what_things_are() -> None:
    vague = re.compile(r"^Base[A-Z]|Manager$|Helper$|Utils?$")
    classes = [node.name for path in PRODUCT for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
    assert not [name for name in classes if vague.search(name)]
    assert not [name_of(path) for path in PRODUCT if path.stem in {"utils", "common", "helpers", "misc", "base"}]


def test_nothing_runs_code_from_data() -> None:
    """No eval, exec, pickle or torch.load, and no code from a checkpoint."""
    found = []
    for path in PRODUCT:
        tree = parse(path)
        found += [f"{name_of(path)}: {name}" for name in imported(tree) if name.split(".")[0] in {"pickle", "marshal"}]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"eval", "exec", "torch.load"}:
                found.append(f"{name_of(path)}:{node.lineno} {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", name_of(path)
    assert not found


def test_nothing_names_the_machine_it_was_written_on() -> None:
    machine = re.compile(r"(?<![\w.~])/(?:work|root|home|farm|tmp|mnt|opt)/\w|\.\./shared\b|\.library\b")
    found = [
        f"{name_of(path)}:{number} {line.strip()[:100]}"
        for path in project_files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if len(line) < 2000 and machine.search(line)
    ]
    assert not found


def test_nothing_is_left_open() -> None:
    left_open = re.compile(r"\b(?:TO[D]O|FIX[M]E|X[X]X)\b|mark\.(?:ski[p]|xfai[l])|pytest\.(?:ski[p]|importorski[p])")
    found = [
        f"{name_of(path)}:{number} {line.strip()[:100]}"
        for path in PYTHON
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if left_open.search(line)
    ]
    assert not found


HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("llmkit_")}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_typed_and_used(name: str) -> None:
    hook = HOOKS[name]
    assert inspect.getdoc(hook), f"{name} has no docstring"
    assert get_type_hints(hook).keys() == {*inspect.signature(hook).parameters, "return"}
    users = [path for path in PRODUCT if path.name != "hookspecs.py" and name in path.read_text("utf-8")]
    assert users, f"{name} has no user in the tree"


def test_the_vocabulary_is_sorted_and_complete() -> None:
    names = llmkit.__all__
    assert names == sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    missing = [name for name in names if not hasattr(llmkit, name)]
    assert not missing
    assert set(names) <= set(dir(llmkit))
