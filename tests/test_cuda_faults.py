"""tests/cuda_faults.py's faults are planted where they are meant to be, and none passes unseen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cuda_faults
import emulated
import pytest


def test_every_fault_has_its_place(tmp_path: Path) -> None:
    cuda_faults.plant(tmp_path)
    text = "".join(file.read_text() for file in (tmp_path / "cuda").iterdir())
    for number in range(1, len(cuda_faults.FAULTS) + 1):
        assert f"is_planted({number}) " in text


@pytest.mark.slow  # a library of its own is compiled
def test_every_fault_is_caught() -> None:
    if (reason := emulated.why_not()) is not None:
        pytest.skip(reason)
    command = [sys.executable, str(Path(cuda_faults.__file__))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
