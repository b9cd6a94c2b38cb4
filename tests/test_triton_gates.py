"""The Triton kernels compiled for GPUs that aren't there: tests/triton_gates.py, and launches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(command: list[str], tmp_path: Path) -> str:
    """In a process of its own: Triton decides once whether it interprets."""
    paths = os.pathsep.join((str(HERE.parent), str(HERE)))
    environment = os.environ | {
        "PYTHONPATH": paths,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    problems = ["attention D 64", "decoding D 128", "losses V 50257, rich"]
    assert "7 kernels, 0 failed" in run([str(HERE / "triton_gates.py"), "90", *problems], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_gates_hold(tmp_path: Path) -> None:
    assert " 0 failed" in run([str(HERE / "triton_gates.py")], tmp_path)


def test_a_launch_takes_little_time(tmp_path: Path) -> None:
    """Python's share of a call, best of many: about 30 µs on a 2.8 GHz server processor."""
    code = """
import time, fake_gpu, torch
from fastattn.kernels.attention_fwd import attn_fwd
from fastattn.problem import AttentionProblem
driver = fake_gpu.use(90)
q = torch.empty(2, 1024, 8, 64, dtype=torch.bfloat16)
p = AttentionProblem(q, q, q, window_right=0)
best = 1.0
for _ in range(300):
    start = time.perf_counter()
    attn_fwd(p)
    best = min(best, time.perf_counter() - start)
assert driver.launches == 300 and len(driver.compiled) == 1
print(best)
"""
    assert float(run(["-c", code], tmp_path)) < 100e-6
