"""The Triton kernels compiled for GPUs that aren't there: tests/triton_gates.py, and launches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
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
    assert "8 kernels, 0 failed" in run([str(HERE / "triton_gates.py"), "90", *problems], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_gates_hold(tmp_path: Path) -> None:
    assert " 0 failed" in run([str(HERE / "triton_gates.py")], tmp_path)


# Calls the operator as Python does, with CPU tensors and a driver that launches nothing. What the
# driver's own launcher would take is Triton's C code; this one's quarter of a microsecond is in it.
LAUNCHES = """
import statistics, time, fake_gpu, torch
from fastattn import backend_triton
from fastattn.problem import AttentionProblem
backend_triton.unusable = lambda: None
backend_triton.refuses = lambda p, asked: None
driver = fake_gpu.use(90)
q, k, v = (torch.empty(2, 1024, 8, 64, dtype=torch.bfloat16) for _ in range(3))
p = AttentionProblem(q, k, v, window_right=0)
op, best, launches = torch.ops.fastattn.attn_fwd, 1.0, 0
while launches < 20000 and best >= 25e-6:  # until the machine is quiet for a moment
    times = []
    for _ in range(200):
        start = time.perf_counter()
        op(*p, "triton")
        times.append(time.perf_counter() - start)
    launches += len(times)
    best = min(best, statistics.median(times))
assert driver.launches == launches and len(driver.compiled) == 1
print(best)
"""


def test_a_launch_takes_little_time(tmp_path: Path) -> None:
    """Python's share of a call from the operator to the driver: about 17 µs on a 3 GHz server."""
    assert float(run(["-c", LAUNCHES], tmp_path)) < 25e-6


TUNING = """
import fake_gpu, torch
from fastattn.kernels import tuning
from fastattn.kernels.attention_fwd import _fwd, attn_fwd
from fastattn.problem import AttentionProblem
tried = []
def milliseconds(launch):
    launch.run()
    tried.append(launch.tile)
    return -len(tried)
tuning.milliseconds, tuning.device_name = milliseconds, lambda: "none"
fake_gpu.use(120)
q = torch.empty(2, 1024, 8, 64, dtype=torch.bfloat16)
attn_fwd(AttentionProblem(q, q, q))
((kernel, tiles),) = tuning._read(tuning.path_for("none")).items()
print(kernel)
print(list(tiles.values()) == [list(tried[-1])], len(tried))
"""


@pytest.mark.slow
def test_neighbours_of_tiles_compile_or_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_TRITON_AUTOTUNE", "on")
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path))
    kernel, tiles = run(["-c", TUNING], tmp_path).splitlines()
    name, _, version, source = kernel.split()
    assert (name, version, len(source)) == ("attn_fwd_kernel", triton.__version__, 16)
    kept, tried = tiles.split()
    assert kept == "True" and 3 <= int(tried) <= 7
