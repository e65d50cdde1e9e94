"""A pytest plugin for processes with TRITON_INTERPRET=1: the interpreter of Triton 3.6 on numpy 2.4 and later.

It makes ints of arrays of one element in a way that numpy 2.4 has taken away; Triton 3.7 no longer does.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

patch_tensor = interpreter._patch_lang_tensor


def patch_and_mend(tensor: Any, scope: Any) -> None:
    """Triton's own patch, then an `__index__` that takes arrays of one element."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = patch_and_mend
