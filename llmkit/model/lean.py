"""Imports transformers without what no run of llmkit uses, which is most of the time such an import takes.

Its modelling code also imports torch._dynamo, torch.distributed.tensor and every loss there is, and accelerate,
scikit-learn or torchvision where they are installed; it reads every file of its 500 model folders, twice, and the file
lists of all installed distributions. Torch's meta kernels import sympy. Inside `lean_imports` all that waits: a name
that is imported from such a module stands for the real one until it is called, subclassed or looked into. Behind the
block nothing of it is left in `sys.modules`, so whoever imports those modules afterwards gets them as they are.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Union, Unpack

from llmkit.model.bytecode import LIBRARIES, compile_libraries, read_from
from llmkit.model.distributions import Distributions
from llmkit.model.import_hooks import DYNAMO, look_at_ends, then, when_dynamo_comes

SHAPES = "torch.fx.experimental.symbolic_shapes"
DEFERRED = (
    DYNAMO,
    SHAPES,
    "sympy",
    *(f"torch.{name}" for name in ("distributed.checkpoint", "distributed.fsdp", "distributed.tensor")),
    "torch.nn.attention.flex_attention",
    *(f"transformers.distributed.{name}" for name in ("checkpoint", "expert_parallel", "fsdp", "parallel_utils")),
    *(f"transformers.distributed.{name}" for name in ("pipeline_parallel", "sharding_utils", "tensor_parallel")),
    "transformers.generation.continuous_batching.cache",
    *(f"transformers.integrations.{name}" for name in ("deepgemm", "flash_paged", "flex_attention")),
    *(f"transformers.loss.loss_{name}" for name in ("ctc", "d_fine", "deformable_detr", "deimv2", "grounding_dino")),
    *(f"transformers.loss.loss_{name}" for name in ("for_object_detection", "lsd", "lw_detr", "rf_detr", "rnnt")),
    *(f"transformers.loss.loss_{name}" for name in ("rt_detr", "tdt")),
    *(f"transformers.{name}" for name in ("image_utils", "processing_utils", "quantizers.auto")),
    *("accelerate", "httpx._main", "librosa", "sklearn", "torchaudio", "torchvision"),
)
"""Modules that wait, with all below them. A name that some version of transformers does not know does no harm."""
UNREAD = "transformers.models"
"""The package whose own code reads every file below it; its submodules are imported as usual."""
READER = "transformers.utils.import_utils"
"""What reads the same files once more, for the names that transformers itself offers."""

FROZEN_BY_PYTHON = 1000
"""Python 3.12 freezes some hundreds of objects itself when it starts; an application that freezes has more."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """A block whose imports bring `DEFERRED` in when used only. What is imported already stays; blocks may nest.

    Garbage is not collected meanwhile: imports make hundreds of thousands of objects and hardly any garbage. Afterwards
    they count as old, so that the next collections of young objects do not look at them.
    """
    if _Finder.current is not None:
        yield
        return
    collects = gc.isenabled()
    gc.disable()
    finder = _Finder.current = _Finder()
    listed = importlib.metadata.packages_distributions
    sys.meta_path.insert(0, finder)
    importlib.metadata.packages_distributions = lambda: Distributions(listed)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = listed
        sys.meta_path.remove(finder)
        finder.forget(*DEFERRED, UNREAD)
        _Finder.current = None
        if collects:
            if gc.get_freeze_count() < FROZEN_BY_PYTHON:
                gc.freeze()
                gc.unfreeze()
            gc.enable()


class _Finder(MetaPathFinder, Loader):
    """Answers imports of deferred modules, if they exist at all, with stand-ins."""

    current: _Finder | None = None

    def __init__(self) -> None:
        self._wanted: set[str] = set()
        self._bytecode = compile_libraries()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == READER:
            return then(PathFinder.find_spec(name, path), look_at_ends)
        root = _root_of(name)
        if root is None or root in self._wanted:
            if self._bytecode is not None and name.partition(".")[0] in LIBRARIES:
                return read_from(PathFinder.find_spec(name, path), self._bytecode)
            return None
        spec = ModuleSpec(name, self, is_package=True)
        if name == root:
            real = PathFinder.find_spec(name, path)
            if real is None:
                return None
            if name == UNREAD:
                spec.submodule_search_locations = real.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""

    def bring(self, name: str) -> None:
        """From now on imports of `name`, and of what is deferred with it, are real.

        Modules of torch calculate with names of sympy and compare them by identity, which no stand-in can do.
        """
        root = _root_of(name)
        if root is not None:
            roots = (root, SHAPES, "sympy") if root.startswith("torch.") else (root,)
            self._wanted.update(roots)
            self.forget(*roots)

    @staticmethod
    def forget(*roots: str) -> None:
        """Take stand-ins out of `sys.modules` and of the packages that they are in."""
        for name, module in list(sys.modules.items()):
            if isinstance(module, _Absent) and any(name == root or name.startswith(f"{root}.") for root in roots):
                del sys.modules[name]
                package, _, last = name.rpartition(".")
                if isinstance(getattr(sys.modules.get(package), "__dict__", {}).get(last), _Absent):
                    delattr(sys.modules[package], last)


def _root_of(name: str) -> str | None:
    """What keeps `name` waiting, if anything does."""
    if name == UNREAD:
        return UNREAD
    return next((root for root in DEFERRED if name == root or name.startswith(f"{root}.")), None)


class _Absent(ModuleType):
    """Stands for a deferred module; whatever is asked of it is a name that may be wanted later."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "Unpack":  # all that modelling code wants of transformers.processing_utils
            return Unpack
        real = sys.modules.get(self.__name__)
        if real is not self and hasattr(real, name):
            return getattr(real, name)
        inner = f"{self.__name__}.{name}"
        if self.__name__ == UNREAD and importlib.util.find_spec(inner) is not None:
            return importlib.import_module(inner)
        answer = sys.modules.get(inner) or _Later(self.__name__, name)
        if self.__name__ == SHAPES:
            vars(self)[name] = answer  # one probe imports these tens of thousands of times
        return answer


class _Later:
    """Stands for one name of a deferred module, as a class, a function or a constant."""

    def __init__(self, module: str, name: str) -> None:
        self.__module__, self.__name__ = module, name
        self._early = EARLY.get((module, name))

    @cached_property
    def _real(self) -> Any:
        if _Finder.current is not None:
            _Finder.current.bring(self.__module__)
        return getattr(importlib.import_module(self.__module__), self.__name__)

    def __getattr__(self, name: str) -> Any:
        # typing asks for some of these whenever it meets an annotation; transformers documents methods by the others.
        if name.startswith("__") and name not in ("__bases__", "__annotations__"):
            raise AttributeError(name)
        return getattr(self._real, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._early is None or _is_loaded(self.__module__):
            return self._real(*args, **options)
        return self._early(*args, **options)

    def __instancecheck__(self, instance: object) -> bool:
        # Nothing is an instance of a class of a module that never ran.
        return _is_loaded(self.__module__) and isinstance(instance, self._real)

    def __subclasscheck__(self, subclass: type) -> bool:
        return _is_loaded(self.__module__) and issubclass(subclass, self._real)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any]:
        return (self._real,)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - X | Y would ask us again

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007

    def __getitem__(self, key: Any) -> Any:
        return self._real[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._real

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real)

    def __len__(self) -> int:
        return len(self._real)


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and type(module) is not _Absent


def _disabled_later(function: Any = None, *args: Any, **options: Any) -> Any:
    """`torch._dynamo.disable(function, ...)`. Nothing can be compiled before torch._dynamo is there, so until then
    `function` itself will do: many of torch's meta kernels ask for this when they first run."""
    if function is None:
        return partial(_disabled_later, **options)
    disabled: Any = None

    @wraps(function)
    def run(*inputs: Any, **keywords: Any) -> Any:
        nonlocal disabled
        if not _is_loaded(DYNAMO):
            return function(*inputs, **keywords)
        if disabled is None:
            disabled = sys.modules[DYNAMO].disable(function, *args, **options)
        return disabled(*inputs, **keywords)

    return run


CONDITIONS = ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true")
EARLY: dict[tuple[str, str], Callable[..., Any]] = {
    (DYNAMO, "disable"): _disabled_later,
    **{(DYNAMO, mark): partial(when_dynamo_comes, mark) for mark in ("allow_in_graph", "assume_constant_result")},
    **{(SHAPES, name): lambda condition, *_: condition for name in CONDITIONS},
    (SHAPES, "is_nested_int"): lambda _: False,
    (SHAPES, "sym_and"): lambda *conditions: all(conditions),
    (SHAPES, "sym_or"): lambda *conditions: any(conditions),
    (SHAPES, "sym_eq"): lambda x, y: x == y if isinstance(x, int) else tuple(x) == tuple(y),
}
"""What callables of deferred modules do before their module comes.

All numbers are plain before torch.fx.experimental.symbolic_shapes comes, which torch's meta kernels ask about each.
"""
