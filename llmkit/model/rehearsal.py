"""Compiles the Triton kernels of a step side by side instead of one after the other as the step meets them.

In processes of their own: most of Triton's work holds Python's lock. They find no GPU and need none; what they leave is
Triton's cache on disk, in which the step then finds its kernels and their launchers.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)
MAX_PROCESSES = 16
PATIENCE = 120
"""Seconds after which a process that compiles is given up, and ends itself if it can."""
FRESH = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty}

_is_on: ContextVar[bool] = ContextVar("llmkit_rehearses", default=False)


def is_rehearsing() -> bool:
    """Whether this is called by a step of `rehearse`."""
    return _is_on.get()


def rehearse(device: torch.device, *steps: Callable[[], object]) -> None:
    """Call `steps` without running a kernel of theirs, then compile all that are not in Triton's cache.

    A step meets zeros where kernels would have written, so no index leads astray; it must not read results back. Where
    nothing is compiled, on a CPU or in Triton's interpreter, the steps are not called. What fails here is left to the
    real step, which says why; where no process can be started, it compiles.
    """
    compile_ahead(device, *steps)()


def compile_ahead(device: torch.device, *steps: Callable[[], object]) -> Callable[[], None]:
    """`rehearse`, but the kernels compile meanwhile: returns a function that waits for them."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return lambda: None
    try:
        return _side_by_side(_kernels_of(steps))
    except ImportError:
        pass  # without Triton there is nothing to compile
    except Exception as fault:
        log.warning("kernels compile one by one: %s", str(fault).partition("\n")[0])
    return lambda: None


class _Asked:
    """What kernels ask of Triton's `AsyncCompileMode`: takes note of those that have to be compiled."""

    def __init__(self) -> None:
        self.works: dict[str, Callable[[], Any]] = {}

    def submit(self, key: str, compile_kernel: Callable[[], Any], finish: Callable[[Any], None]) -> Any:
        """`key` is what Triton's cache knows the kernel by. Triton keeps what is returned in the kernel's place; the
        first launch of it compiles the kernel, or reads it from that cache."""
        from triton.runtime._async_compile import FutureKernel

        if key not in self.works and not _is_compiled(key):
            self.works[key] = compile_kernel
        later: Any = SimpleNamespace(result=compile_kernel)
        return FutureKernel(finish, later)


def _is_compiled(key: str) -> bool:
    from triton.runtime.cache import get_cache_manager

    folder: Any = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    return any(Path(folder.cache_dir).glob("__grp__*"))  # written last


def _kernels_of(steps: Sequence[Callable[[], object]]) -> list[Callable[[], Any]]:
    """What compiles the kernels that `steps` would launch and that are not in Triton's cache."""
    from triton.runtime import _async_compile
    from triton.runtime.jit import JITFunction

    asked, run = _Asked(), JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=warmup or is_rehearsing(), **options)  # other threads launch

    mode: Any = _async_compile.active_mode
    JITFunction.run = compile_only
    before, on = mode.set(asked), _is_on.set(True)
    try:
        with torch.inference_mode(), _Zeros():
            for step in steps:
                step()
    finally:
        mode.reset(before)
        _is_on.reset(on)
        JITFunction.run = run
    return list(asked.works.values())


def _side_by_side(works: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """Do `works` in processes; returns a function that waits for them."""
    context, count = multiprocessing.get_context("fork"), min(MAX_PROCESSES, os.cpu_count() or 1, len(works))
    if count < 2:
        return lambda: None
    numbers = context.SimpleQueue()
    for number in range(len(works)):
        numbers.put(number)
    processes = [context.Process(target=_work, args=(works, numbers), daemon=True) for _ in range(count)]
    for _ in processes:
        numbers.put(None)
    with warnings.catch_warnings():
        # Threads of this process may hold locks for ever in the new ones, which is what PATIENCE is for.
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in processes:
            process.start()
    deadline = time.monotonic() + PATIENCE

    def wait() -> None:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()

    return wait


def _work(works: Sequence[Callable[[], Any]], numbers: Any) -> None:
    """Compile what no other process has begun, and the launchers; what fails says so in the real step."""
    from triton.runtime import driver

    gc.disable()  # what is garbage here is the parent's, on a device that this process must not touch
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(ending, signal.SIG_DFL)  # a handler of the parent's could not end what waits for a lock
    signal.alarm(PATIENCE)  # nobody gives this process up if its parent is gone
    for output in (1, 2):  # who reads the parent's sees its end without waiting for this process
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    for number in iter(numbers.get, None):
        with contextlib.suppress(Exception):
            kernel = works[number]()
            driver.active.launcher_cls(kernel.src, kernel.metadata)


class _Zeros(TorchFunctionMode):
    """Fresh memory holds zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.zero_() if func in FRESH else out
