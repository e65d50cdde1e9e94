"""Which distribution a package is of, without reading the file lists of all that are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property


class Distributions(Mapping[str, list[str]]):
    """`packages_distributions()`, which lists the files of every distribution, where a name alone does not tell."""

    def __init__(self, listed: Callable[[], Mapping[str, list[str]]]) -> None:
        self._listed = listed

    @cached_property
    def _all(self) -> Mapping[str, list[str]]:
        return self._listed()

    def __getitem__(self, package: str) -> list[str]:
        if "_all" in self.__dict__:
            return self._all[package]
        try:
            return [importlib.metadata.distribution(package).metadata["Name"]]
        except importlib.metadata.PackageNotFoundError:
            if importlib.util.find_spec(package) is None:
                raise KeyError(package) from None
        return self._all[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
