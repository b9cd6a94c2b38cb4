"""`import flash_attn` finds fastattn's functions, and the real package is not hidden unasked."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastattn import bert_padding, flash_attn


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    flash_attn.uninstall()
    assert "flash_attn" not in sys.modules


@pytest.fixture
def real_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("real = True\n")
    (package / "layers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    flash_attn.uninstall()
    for name in ("flash_attn", "flash_attn.layers"):
        sys.modules.pop(name, None)


def test_every_way_to_import() -> None:
    flash_attn.install()
    flash_attn.install()  # changes nothing
    package = importlib.import_module("flash_attn")
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    padding = importlib.import_module("flash_attn.bert_padding")
    for name in flash_attn.__all__:
        if name.startswith("flash_attn"):
            assert getattr(package, name) is getattr(interface, name) is getattr(flash_attn, name)
    assert padding.pad_input is bert_padding.pad_input
    assert package.bert_padding is padding and package.flash_attn_interface is interface


def test_what_others_ask_before_they_import() -> None:
    flash_attn.install()
    for name in ("flash_attn", "flash_attn.bert_padding"):
        assert importlib.util.find_spec(name) is not None
    version = importlib.import_module("flash_attn").__version__
    assert version.startswith("2.8")
    for name in ("flash_attn", "flash-attn"):
        assert importlib.metadata.version(name) == version
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert importlib.metadata.version("torch")  # others are found as ever


def test_modules_that_are_not_there() -> None:
    flash_attn.install()
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.losses"):
        importlib.import_module("flash_attn.losses")


def test_uninstall() -> None:
    flash_attn.uninstall()  # nothing to undo
    flash_attn.install()
    flash_attn.uninstall()
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")


@pytest.mark.parametrize("imported", [False, True])
def test_the_real_package_stays(real_package: None, imported: bool) -> None:
    if imported:
        importlib.import_module("flash_attn.layers")
    with pytest.raises(RuntimeError, match="force=True"):
        flash_attn.install()
    assert importlib.import_module("flash_attn").real
    flash_attn.install(force=True)
    assert not hasattr(importlib.import_module("flash_attn"), "real")
    assert "flash_attn.layers" not in sys.modules
    flash_attn.uninstall()
    assert importlib.import_module("flash_attn").real
    assert importlib.import_module("flash_attn.layers")
