"""`import flash_attn` finds fastattn's functions, and the real package is not hidden unasked."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


def test_transformers_flash_attention_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model asked for flash_attention_2 runs on it: padding, a cache, the kwargs they look for.

    transformers offers that on GPUs only, so its question is answered for it.
    """
    transformers = pytest.importorskip("transformers")
    theirs = importlib.import_module("transformers.modeling_flash_attention_utils")
    flash_attn.install()
    monkeypatch.setattr(
        transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: 1
    )
    monkeypatch.setattr(theirs, "is_flash_attn_2_available", lambda *_, **__: True)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn"):
        monkeypatch.setattr(theirs, name, None)
    models = []
    for implementation in ("eager", "flash_attention_2"):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=65,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
        model = transformers.LlamaForCausalLM._from_config(
            config, attn_implementation=implementation
        )
        models.append(model.eval())
    eager, fused = models
    assert theirs._flash_fn is flash_attn.flash_attn_func
    ids, mask = torch.randint(1, 65, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        logits = [m(ids, attention_mask=mask).logits[mask.bool()] for m in models]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(eager.generate(ids, **options), fused.generate(ids, **options))
