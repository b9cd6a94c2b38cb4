"""The two halves of PTX, csrc/cuda's and the emulator's, declare the same functions."""

from __future__ import annotations

import re

import pytest
from emulator import build


@pytest.mark.parametrize("suffix", ["", "_sm90"])
def test_emulated_ptx_declares_what_ptx_cuh_does(suffix: str) -> None:
    def declared(path: str, qualifier: str) -> set[str]:
        text = re.sub(r"//.*", "", (build.ROOT / path).read_text())
        found = re.findall(rf"((?:template <[^>]*>\s+)?){qualifier} (\w+ \w+\([^{{]*\)) {{", text)
        plain = (re.sub(r",?\s*Site site = Site::here\(\)", "", " ".join(f)) for f in found)
        return {re.sub(r"\s+", " ", declaration) for declaration in plain}

    device = declared(f"csrc/cuda/ptx{suffix}.cuh", "FASTATTN_DEVICE")
    emulated = declared(f"tests/emulator/emulated_ptx{suffix}.h", "EMULATED")
    # One half alone has an address, and the products that csrc/cuda/wgmma.py writes out.
    assert len(device) > 10
    assert {re.split(r"\W", d.split("(")[0])[-1] for d in device ^ emulated} <= {
        "shared_address", "wgmma"
    }  # fmt: skip
