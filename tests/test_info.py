"""`fastattn info` says what runs here and why, whatever is missing."""

import pytest

from fastattn import info, library
from fastattn.backends import TABLE


def test_report_names_every_backend_and_extra():
    text = info.report()
    for row in TABLE:
        assert row.name in text
    for names in info.EXTRAS.values():
        for name in names:
            assert name in text
    assert "AMX" in text
    assert text.startswith("fastattn ")


@pytest.mark.skipif(library.load_error() is not None, reason="needs the compiled kernels")
def test_isa_is_the_one_in_use(monkeypatch):
    monkeypatch.delenv("FASTATTN_CPU_ISA", raising=False)
    text = info.cpu_isa()
    assert text.startswith(f"instruction set: {library.cpu_isa()}; ")
    assert "scalar" in text  # always usable


def test_without_kernels_it_says_so_and_works(monkeypatch):
    monkeypatch.setattr(library, "load_error", lambda: "fastattn/_C*.so is missing: no compiler")
    rows = dict(info.backends())
    assert rows["cpu"] == "not usable: fastattn/_C*.so is missing: no compiler"
    assert rows["reference"].startswith("usable")


def test_bad_isa_is_reported_not_raised(monkeypatch):
    def refuse():
        raise RuntimeError("FASTATTN_CPU_ISA=sse can't be used here; usable: scalar")

    monkeypatch.setattr(library, "instruction_sets", refuse)
    monkeypatch.setenv("FASTATTN_CPU_ISA", "sse")
    assert "FASTATTN_CPU_ISA=sse can't be used here" in info.cpu_isa()


def test_forced_backend_is_shown(monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert dict(info.backends())["forced"] == "FASTATTN_BACKEND=reference"
    monkeypatch.setenv("FASTATTN_BACKEND", "quantum")
    assert "is no backend" in dict(info.backends())["forced"]


def test_amx_note():
    assert info.amx_note("fpu avx2 avx512f").startswith("none")
    assert "SDPA" in info.amx_note("fpu avx512f amx_bf16 amx_tile")


def test_missing_extra_names_its_install_command(monkeypatch):
    monkeypatch.setattr(info, "installed_version", lambda name: None)
    text = dict(info.optional_packages())["train"]
    assert "missing: safetensors" in text
    assert "pip install 'fastattn[train]'" in text


def test_cores_are_counted():
    assert info.usable_cores() >= 1
