"""Registers `fastattn.flash_attn` as the package flash_attn, for code that imports that one.

Importers look in three places: sys.modules, importlib.util.find_spec, and the metadata of installed
distributions (transformers asks for the version). All three answer while it is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

NAME = "flash_attn"
VERSION = "2.8.3+fastattn"  # the release whose semantics these are, and whose code it is not
_MODULES = {
    NAME: "fastattn.flash_attn",
    f"{NAME}.flash_attn_interface": "fastattn.flash_attn",
    f"{NAME}.bert_padding": "fastattn.bert_padding",
}


def install(force: bool = False) -> None:
    """`import flash_attn` finds fastattn's functions from now on, in this process.

    There are flash_attn, flash_attn.flash_attn_interface and flash_attn.bert_padding; its other
    modules (layers, losses, ops, …) raise ModuleNotFoundError. Call it before the code that imports
    flash_attn is itself imported. A second call does nothing.

    Args:
        force: install it though the real package is there. What was imported from that one keeps
            working as it was.

    Raises:
        RuntimeError: the real flash_attn is installed and `force` is not given.
    """
    if _installed():
        return
    if not force and (NAME in sys.modules or importlib.util.find_spec(NAME) is not None):
        raise RuntimeError(
            "the real flash_attn is installed here; install(force=True) hides it from code that is"
            " imported later"
        )
    for name in [n for n in sys.modules if n == NAME or n.startswith(f"{NAME}.")]:
        _hidden[name] = sys.modules.pop(name)
    for name, source in _MODULES.items():
        sys.modules[name] = _alias(name, importlib.import_module(source))
    for name in _MODULES:
        if name != NAME:
            setattr(sys.modules[NAME], name.rpartition(".")[2], sys.modules[name])
    sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Undoes `install`; what it hid comes back. Does nothing where nothing is installed."""
    if not _installed():
        return
    sys.meta_path.remove(_FINDER)
    for name in _MODULES:
        del sys.modules[name]
    sys.modules.update(_hidden)
    _hidden.clear()


_hidden: dict[str, ModuleType] = {}  # the real package's modules, under force


def _installed() -> bool:
    return _FINDER in sys.meta_path


def _alias(name: str, source: ModuleType) -> ModuleType:
    """A module of this name with the source's public names."""
    alias = ModuleType(name, source.__doc__)
    alias.__spec__ = ModuleSpec(name, loader=None, origin=source.__file__, is_package=name == NAME)
    names = getattr(source, "__all__", None) or [n for n in vars(source) if not n.startswith("_")]
    alias.__dict__.update({n: getattr(source, n) for n in names})
    if name == NAME:
        alias.__path__ = []  # a package, of which there is no more on disk
        alias.__version__ = VERSION  # type: ignore[attr-defined]
    return alias


class _Distribution(importlib.metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\n",
            "top_level.txt": f"{NAME}\n",
        }.get(filename)

    def locate_file(self, path):
        return path


class _Finder(importlib.metadata.DistributionFinder):
    """Finds no modules, they are in sys.modules; finds the distribution flash-attn."""

    def find_spec(self, name, path=None, target=None):
        return None

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):  # noqa: B008
        if context.name is None or context.name.replace("-", "_").lower() == NAME:
            yield _Distribution()


_FINDER = _Finder()
