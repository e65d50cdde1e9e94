"""Compiles the Triton kernels of a step side by side instead of one after the other as the step meets them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)
MAX_THREADS = 16
FRESH = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty}


_is_on: ContextVar[bool] = ContextVar("llmkit_rehearses", default=False)


def is_rehearsing() -> bool:
    """Whether this is called by a step of `rehearse`."""
    return _is_on.get()


def rehearse(device: torch.device, *steps: Callable[[], object]) -> None:
    """Call `steps` without running a kernel of theirs, then compile and load all that are new, in threads.

    A step meets zeros where kernels would have written, so no index leads astray; it must not read results back. Where
    nothing is compiled, on a CPU or in Triton's interpreter, the steps are not called. What fails here is left to the
    real step, which says why.
    """
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return
    try:
        import triton
        from triton.runtime.jit import JITFunction
    except ImportError:
        return
    kernels: list[Any] = []
    run: Any = JITFunction.run
    index = torch.cuda.current_device() if device.index is None else device.index

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(kernel, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, initializer=torch.cuda.set_device, initargs=(index,)) as pool:
        JITFunction.run = compile_only
        try:
            with torch.inference_mode(), triton.AsyncCompileMode(pool, ignore_errors=True), _Zeros(), _marked():
                for step in steps:
                    step()
        except Exception as fault:
            log.warning("kernels compile one by one: %s", str(fault).partition("\n")[0])
            return
        finally:
            JITFunction.run = run
        with _launchers_apart():
            list(pool.map(_load, {id(kernel): kernel for kernel in kernels}.values()))


def _load(kernel: Any) -> None:
    """Bring a kernel, or one that is still being compiled, to the device."""
    kernel = kernel.result(ignore_errors=True) if hasattr(kernel, "result") else kernel
    if kernel is not None:
        _ = kernel.run  # makes the launcher, which the compiler does not


@contextmanager
def _launchers_apart() -> Iterator[None]:
    """Triton imports every launcher under one name. One that was imported before, for a kernel with the same arguments,
    comes back as the module of that name, filled anew: a thread would find in it what another has asked for meanwhile.
    So they are imported one at a time, and each thread gets a copy.
    """
    from triton.runtime import build

    load: Any = build._load_module_from_path
    lock = Lock()

    def load_alone(name: str, path: str) -> Any:
        with lock:
            return SimpleNamespace(**vars(load(name, path)))

    build._load_module_from_path = load_alone
    try:
        yield
    finally:
        build._load_module_from_path = load


@contextmanager
def _marked() -> Iterator[None]:
    token = _is_on.set(True)
    try:
        yield
    finally:
        _is_on.reset(token)


class _Zeros(TorchFunctionMode):
    """Fresh memory holds zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.zero_() if func in FRESH else out
