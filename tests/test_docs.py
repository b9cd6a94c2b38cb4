"""The documentation is of this code: the API page is current, links lead somewhere, code runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import fastattn
from fastattn import flash_attn

DOCS = Path(__file__).parents[1] / "docs"
MAKE_API = runpy.run_path(str(DOCS / "make_api.py"))


def test_the_api_page_is_current() -> None:
    assert (DOCS / "api.md").read_text(encoding="utf-8") == MAKE_API["page"](), "run `make docs`"


def test_every_public_name_is_on_the_api_page() -> None:
    listed = {name for _, _, names in MAKE_API["SECTIONS"] for name in names}
    public = (set(fastattn.__all__) - {"flash_attn"}) | (set(flash_attn.__all__) - {"bert_padding"})
    assert public <= listed


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
