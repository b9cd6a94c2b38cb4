"""The examples run, small, and show what they say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from fastattn import routing

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_drop_in(capsys: pytest.CaptureFixture[str]) -> None:
    results = runpy.run_path(str(EXAMPLES / "drop_in.py"))["main"](quick=True)
    assert len(results) == 3
    for before, after in results:
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    printed = capsys.readouterr().out
    assert "self_attn  fastattn.MultiheadAttention" in printed and "chosen" in printed
    assert not routing._routings


def test_packed_training() -> None:
    losses = runpy.run_path(str(EXAMPLES / "packed_training.py"))["main"](quick=True)
    assert losses[-1] < 0.8 * losses[0]


def test_finetune_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"layers": 1, "width": 64, "steps": 3, "batch": 2, "length": 32}
    arguments = [text for name, n in sizes.items() for text in (f"--{name}", str(n))]
    results = runpy.run_path(str(EXAMPLES / "finetune_transformers.py"))["main"](arguments)
    ours, sdpa = results["fastattn"], results["sdpa"]
    assert ours.loss == pytest.approx(sdpa.loss, abs=1e-3) and ours.loss < 10.8  # ln 50,257 = 10.82
    assert len(ours.seconds) == len(sdpa.seconds) == 3
    assert "validation loss" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would ask for the CUDA kernels")
def test_the_notebook_runs() -> None:
    """All cells in order, but for lines that are the shell's."""
    cells = json.loads((EXAMPLES / "colab_t4.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            lines = [line for line in cell["source"] if not line.startswith("!")]
            exec(compile("".join(lines), cell["id"], "exec"), names)
    assert names["losses"][-1] < names["losses"][0] / 2
    assert len([ax for ax in names["figure"].axes if ax.images]) == 2
