"""Compiles what the product launches for an H200 on a machine without a GPU, and says what each kernel takes.

Kernels are not called by hand: the product's own launchers run on CPU tensors, and they and Triton are told that an
H200 is there, on which nothing is launched. So tile sizes, warps and specialisations are those of real runs.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from llmkit import cuda
from llmkit.interfaces.attention import LayerSpec
from llmkit_attention.flash import launch

ROOT = Path(__file__).parents[2]
TARGET, NUM_PROCESSORS, MAX_SHARED = GPUTarget("cuda", 90, 32), 132, 227 * 1024
JIT = re.compile(r"(triton|gluon)\.jit\b")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NothingLaunched:
    """A Triton driver that only knows which device to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


class LaunchesNoted(NothingLaunched):
    """Writes into `folder` which process makes a launcher, and keeps the names of kernels that are launched."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 3, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": MAX_SHARED}
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launched: list[str] = []

    def launcher_cls(self, source: object, metadata: Any) -> Callable[..., None]:
        (self.folder / f"{metadata.name} {os.getpid()}").touch()
        return lambda *_: self.launched.append(metadata.name)


class WorkspaceOfAnH200(launch.Workspace):
    """As many shares as on the real one."""

    def __init__(self, layers: Iterable[LayerSpec], device: torch.device) -> None:
        super().__init__(layers, device)
        self.programs = NUM_PROCESSORS * launch.PROGRAMS_PER_PROCESSOR


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program of a compiled kernel takes: registers per thread, spilled bytes per thread, shared bytes."""

    kernel: str
    num_warps: int
    num_registers: int
    num_spilled: int
    num_shared: int


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Inside, launches compile and are collected, as (name, compiled kernel), instead of run."""
    compiled: list[Any] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel))
        return kernel

    triton.runtime.driver.set_active(NothingLaunched())
    with ExitStack() as pretended:
        pretended.enter_context(patch.object(JITFunction, "run", compile_only))
        pretended.enter_context(patch.object(cuda, "can_overlap", lambda device: True))
        pretended.enter_context(patch.object(launch, "is_hopper", lambda device: True))
        pretended.enter_context(patch.object(launch, "Workspace", WorkspaceOfAnH200))
        yield compiled


def resources(name: str, kernel: Any, folder: Path) -> Resources:
    """Read from the machine code, by the tool that comes with Triton; `folder` takes a file."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    said = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    spilled = used["STACK"] + used["LOCAL"]
    return Resources(name, kernel.metadata.num_warps, used["REG"], spilled, kernel.metadata.shared)


def kernels_of_the_project() -> set[str]:
    """Names of all Triton functions in the product that no other one names."""
    defined: list[ast.FunctionDef] = []
    for path in [*ROOT.glob("llmkit/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(JIT.match(ast.unparse(d)) for d in node.decorator_list):
                defined.append(node)
    named = {node.id for function in defined for node in ast.walk(function) if isinstance(node, ast.Name)}
    return {function.name for function in defined} - named
