"""The variants of Hopper's tiles that benchmarks/rank_sm90.py compiles and times on a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import rank_sm90


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_every_variant_changes_the_sources(tmp_path: Path, head_dim: int, backward: bool) -> None:
    variants = rank_sm90.backward_variants if backward else rank_sm90.forward_variants
    found = variants(head_dim)
    assert len({variant.name for variant in found}) == len(found) > 5
    assert [variant.name for variant in found if not variant.edits] == ["as it is"]
    for variant in found:
        for file, *_ in variant.edits:
            shutil.copy(rank_sm90.ROOT / "csrc" / "cuda" / file, tmp_path)
        rank_sm90.apply(variant, tmp_path)
        for file, *_ in variant.edits:
            now = (rank_sm90.ROOT / "csrc" / "cuda" / file).read_text()
            assert (tmp_path / file).read_text() != now
