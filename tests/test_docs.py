"""The documentation is of this code: the API page is current, links lead somewhere, code runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import flash_attn

pytest.importorskip("transformers")  # whose integration is documented, too

ROOT = Path(__file__).parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
MAKE_API = runpy.run_path(str(DOCS / "make_api.py"))


def test_the_api_page_is_current() -> None:
    assert (DOCS / "api.md").read_text(encoding="utf-8") == MAKE_API["page"](), "run `make docs`"


def test_every_public_name_is_on_the_api_page() -> None:
    listed = {name for _, _, names in MAKE_API["SECTIONS"] for name in names}
    public = (set(fastattn.__all__) - {"flash_attn"}) | (set(flash_attn.__all__) - {"bert_padding"})
    assert public <= listed


def test_the_readmes_tree_has_every_file_and_no_other() -> None:
    """By name or pattern; a folder that is listed stands for its files."""
    tree = README.read_text(encoding="utf-8").split("## What is where\n\n```\n")[1].split("```")[0]
    listed: set[Path] = set()
    folder = ROOT
    for line in tree.splitlines():
        for word in re.findall(r"[\w*/]+(?:\.py|\.md|\.h|\.cpp|/)(?!\w)", line):
            if word.endswith("/") and line.startswith(word):
                folder = ROOT / word
                assert folder.is_dir(), word
            else:
                found = set(folder.glob(word.rstrip("/")))
                assert found, f"{folder.name}/{word}"
                listed |= found
    package = {path for path in (ROOT / "fastattn").iterdir() if path.suffix in ("", ".py")}
    unnamed = {"__init__.py", "__main__.py", "__pycache__"}
    assert {path.name for path in package - listed} - unnamed == set()


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


# ---- code in the README and in the pages of the faces --------------------------------------------

FACES = ("flash_attn", "interpretability", "multihead_attention", "pytorch", "sdpa", "transformers")


class Twice(torch.nn.Module):
    """A model that calls torch's attention, and one of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x, x, x, need_weights=False)[0]
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_the_readmes_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.M)
    exec(compile(block, "README.md", "exec"), {})
    assert "chosen" in capsys.readouterr().out


@pytest.mark.parametrize("name", FACES)
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a page, one after the other, with what they take for granted."""
    monkeypatch.chdir(tmp_path)
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    q, k, v = (torch.randn(1, 16, 4, 64) for _ in range(3))
    names = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "fastattn": fastattn}
    names |= {"q": q, "k": k, "v": v, "d": 64, "model": Twice(), "x": torch.randn(2, 5, 64)}
    names |= {"words": [f"w{i}" for i in range(16)]}
    if name == "transformers":
        transformers = pytest.importorskip("transformers")
        from fastattn.integrations.transformers import patch_loss, register

        small = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64)
        transformers.GPT2LMHeadModel(small).save_pretrained(tmp_path / "folder")
        names |= {"patch_loss": patch_loss, "register": register, "folder": tmp_path / "folder"}
        names["GPT2LMHeadModel"] = transformers.GPT2LMHeadModel
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert blocks
    if name == "flash_attn":
        flash_attn.install()  # so that the line before runs too
    try:
        for block in blocks:
            exec(compile(block, f"{name}.md", "exec"), names)
    finally:
        flash_attn.uninstall()
