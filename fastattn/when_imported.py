"""Runs something once another module has been imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, run: Callable[[], object]) -> None:
    """Calls `run` after module `name` is imported; at once if it is already."""
    if name in sys.modules:
        run()
    else:
        sys.meta_path.insert(0, _Watcher(name, run))


class _Watcher(MetaPathFinder):
    """Finds nothing itself: has the others find the module, and `run` follow its execution."""

    def __init__(self, name: str, run: Callable[[], object]):
        self.name, self.run = name, run

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.run()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
