"""examples/finetune_transformers.py runs, and both attentions learn the same."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
EXAMPLE = Path(__file__).parent.parent / "examples" / "finetune_transformers.py"


def test_it_learns_the_same_either_way(capsys):
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sizes = {"layers": 1, "width": 64, "steps": 3, "batch": 2, "length": 32}
    results = example.main([text for name, n in sizes.items() for text in (f"--{name}", str(n))])
    ours, sdpa = results["fastattn"], results["sdpa"]
    assert ours.loss == pytest.approx(sdpa.loss, abs=1e-3) and ours.loss < 10.8  # ln 50,257 = 10.82
    assert len(ours.seconds) == 3
    assert "validation loss" in capsys.readouterr().out
