"""The demo, with a tiny model in place of its own."""

import dataclasses

import pytest

from fastattn import checkpoint, demo
from fastattn.presets import PRESETS

pytest.importorskip("safetensors")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    model = dataclasses.replace(
        PRESETS["demo"].model, n_layer=1, n_embd=16, n_head=1, block_size=64
    )
    preset = dataclasses.replace(
        PRESETS["demo"], data=tmp_path / "data", model=model, steps=5, batch_size=2
    )
    monkeypatch.setitem(PRESETS, "demo", preset)
    monkeypatch.setattr(demo, "LONG", 256)


def test_demo_runs_through_and_says_where_things_are(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    demo.demo(out, minutes=1.0)
    printed = capsys.readouterr().out
    for part in ("backends", "largest error", "step 5/5", "peak memory", "ROMEO:", "loss.png"):
        assert part in printed
    assert (out / "loss.png").exists()
    assert str(checkpoint.latest(out / "checkpoints")) in printed
    demo.demo(out, minutes=1.0)  # again: replaces its run
