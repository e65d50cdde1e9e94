"""A pytest plugin for processes with TRITON_INTERPRET=1: the interpreter of Triton 3.6 on numpy 2.4 and later.

It makes ints of arrays of one element in a way that numpy 2.4 has taken away; Triton 3.7 no longer does. And it cuts
numbers off on their way to e4m3 and knows no NaN there, so torch converts them instead. And it patches all of Triton's
language again for every call of a device function, which takes a quarter of the time; once a launch is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

patch_tensor, convert_float = interpreter._patch_lang_tensor, interpreter._convert_float
patch_language, patched = interpreter._patch_lang, set[str]()


def patch_and_mend(tensor: Any, scope: Any) -> None:
    """Triton's own patch, then an `__index__` that takes arrays of one element."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def convert(numbers: NDArray[Any], source: Any, target: Any, rounding: Any) -> NDArray[Any]:
    """Bits of `numbers` as `target`; e4m3 to the nearest, and to NaN beyond its largest number."""
    if target == tl.float8e4nv and source in (tl.float16, tl.float32):
        wide = torch.from_numpy(numbers).float()
        held = wide.masked_fill(wide.abs() > 464.0, float("nan"))
        return held.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if source == tl.float8e4nv and target in (tl.float16, tl.float32):
        dtype, bits = (torch.float16, np.uint16) if target == tl.float16 else (torch.float32, np.uint32)
        return torch.from_numpy(numbers).view(torch.float8_e4m3fn).to(dtype).numpy().view(bits)
    converted: NDArray[Any] = convert_float(numbers, source, target, rounding)
    return converted


class Scope(interpreter._LangPatchScope):  # type: ignore[misc]
    """What a launch has patched, put back behind it; empty for what it calls."""

    def restore(self) -> None:
        super().restore()
        patched.clear()


def patch_once(function: Any) -> Any:
    """Triton's own patch for the first function of a module that a launch runs."""
    if function.__module__ in patched:
        return Scope()
    patched.add(function.__module__)
    return patch_language(function)


interpreter._LangPatchScope = Scope
interpreter._patch_lang = patch_once
interpreter._patch_lang_tensor = patch_and_mend
interpreter._convert_float = convert
