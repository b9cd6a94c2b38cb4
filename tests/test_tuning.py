"""Tiles found by trial: what is tried, what is kept and where, and when nothing is tried."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastattn import backend_triton
from fastattn.problem import AttentionProblem, CrossEntropyProblem

if (reason := backend_triton.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)

import fake_gpu
from fake_gpu import Started
from fastattn.kernels import tuning
from fastattn.kernels.attention_bwd import attn_bwd
from fastattn.kernels.attention_fwd import attn_fwd
from fastattn.kernels.configs import Tile
from fastattn.kernels.cross_entropy import cross_entropy_fwd
from fastattn.kernels.launch import Launch
from triton.errors import TritonError

TABLE = Tile(128, 128, 8, 2)  # sm_90's for head dim 64
BEST = Tile(128, 64, 8, 2)


class Trials(list[Tile]):
    """The tiles that were timed: BEST is the fastest, and wide ones don't compile."""

    def milliseconds(self, launch: Launch) -> float:
        self.append(launch.tile)
        if launch.tile.block_n > 128:
            raise TritonError("too wide")
        return 1.0 if launch.tile == BEST else 2.0


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trials:
    trials = Trials()
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTATTN_TRITON_AUTOTUNE", "on")
    monkeypatch.setattr(tuning, "milliseconds", trials.milliseconds)
    monkeypatch.setattr(tuning, "device_name", lambda: "NVIDIA H100 80GB")
    monkeypatch.setattr(tuning, "source_of", lambda launch: "a1b2")
    monkeypatch.setattr(tuning, "_here", {})
    return trials


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    with fake_gpu.started(monkeypatch) as started:
        yield started


def forward(seqlen: int = 128, dim: int = 64) -> None:
    q = torch.zeros(1, seqlen, 2, dim, dtype=torch.float16)
    attn_fwd(AttentionProblem(q, q, q))


def process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.forget_plans()
    monkeypatch.setattr(tuning, "_here", {})


def test_the_fastest_tile_is_launched_and_kept(
    trials: Trials, started: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward()
    assert trials[0] == TABLE and len(trials) == len(set(trials)) <= 7
    assert started.planned[-1].tile == BEST
    (path,) = tmp_path.iterdir()
    assert path.name == "triton-tiles-NVIDIA-H100-80GB.json"
    ((kernel, tiles),) = json.loads(path.read_text()).items()
    assert kernel.startswith("attn_fwd_kernel triton 3.") and kernel.endswith(" a1b2")
    assert list(tiles.values()) == [list(BEST)]

    tried = len(trials)
    forward()
    forward(seqlen=200)  # another plan, the same specialisation
    process_ends(monkeypatch)
    forward()
    assert len(trials) == tried and started.planned[-1].tile == BEST
    forward(dim=128)
    assert len(trials) > tried
    assert len(json.loads(path.read_text())[kernel]) == 2


@pytest.mark.parametrize("device, source", [("NVIDIA A100", "a1b2"), ("NVIDIA H100 80GB", "c3d4")])
def test_another_device_or_source_is_tuned_anew(
    device: str, source: str, trials: Trials, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward()
    tried = len(trials)
    process_ends(monkeypatch)
    monkeypatch.setattr(tuning, "device_name", lambda: device)
    monkeypatch.setattr(tuning, "source_of", lambda launch: source)
    forward()
    assert len(trials) == 2 * tried


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"KERNEL": 3}', '{"KERNEL": {"PROBLEM": [128, 64, 8]}}',
     '{"KERNEL": {"PROBLEM": [128, 64, 8, 0]}}', '{"KERNEL": {"PROBLEM": [128, 64, 8, true]}}'],
)  # fmt: skip
def test_what_cannot_be_read_is_overwritten(
    content: str,
    trials: Trials,
    started: Started,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    forward()
    (path,) = tmp_path.iterdir()
    written = path.read_text()
    ((kernel, tiles),) = json.loads(written).items()
    path.write_text(content.replace("KERNEL", kernel).replace("PROBLEM", next(iter(tiles))))
    process_ends(monkeypatch)
    tried = len(trials)
    forward()
    assert len(trials) == 2 * tried and path.read_text() == written


def test_a_cache_that_cannot_be_written_warns(
    trials: Trials, started: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="tuned tiles are forgotten with this process"):
        forward()
    tried = len(trials)
    forward(seqlen=200)
    assert len(trials) == tried and started.planned[-1].tile == BEST


def test_nothing_is_tried_while_a_graph_is_captured(
    trials: Trials, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    forward()
    assert not trials and started.planned[-1].tile == TABLE
    monkeypatch.setattr(tuning, "capturing", lambda: False)
    forward()
    assert trials and started.planned[-1].tile == BEST
    monkeypatch.setattr(tuning, "capturing", lambda: True)
    process_ends(monkeypatch)
    forward()  # known by now
    assert started.planned[-1].tile == BEST


def test_it_is_off_unless_asked_for(
    trials: Trials, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting in ("off", ""):
        monkeypatch.setenv("FASTATTN_TRITON_AUTOTUNE", setting)
        forward()
        fake_gpu.forget_plans()
    monkeypatch.delenv("FASTATTN_TRITON_AUTOTUNE")
    forward()
    assert not trials and {first.tile for first in started.planned} == {TABLE}
    monkeypatch.setenv("FASTATTN_TRITON_AUTOTUNE", "yes")
    fake_gpu.forget_plans()
    with pytest.raises(ValueError, match="FASTATTN_TRITON_AUTOTUNE must be on or off, got 'yes'"):
        forward()


def test_trials_write_to_scratch_only(
    trials: Trials, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are kernels tried that may overwrite what they read."""
    q = torch.zeros(1, 128, 2, 64, dtype=torch.float16)
    p = AttentionProblem(q, q, q)
    out, lse = attn_fwd(p)
    written: set[int] = set()

    def milliseconds(launch: Launch) -> float:
        names = launch.kernel.arg_names
        for name in ("dq", "dk", "dv", "delta"):
            if name in names and name != ("delta" if "dk" in names else ""):
                written.add(launch.arguments[names.index(name)].data.data_ptr())
        return trials.milliseconds(launch)

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    tried = len(trials)
    grads = attn_bwd(p, out, lse, out, None, False)
    assert len(trials) > tried and written
    assert not written & {t.data_ptr() for t in grads[:3] if t is not None}
    tried = len(trials)
    logits = torch.zeros(2, 50)
    p_loss = CrossEntropyProblem(logits, torch.zeros(2, dtype=torch.int64))
    cross_entropy_fwd(p_loss, torch.tensor(1.0), logits)
    assert len(trials) == tried
