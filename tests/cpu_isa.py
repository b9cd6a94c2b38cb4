"""Runs a test file again in a process that is held to one instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

from fastattn import library


def others() -> list[str]:
    """The instruction sets this processor has besides the one that this process uses."""
    return [] if library.load_error() else list(library.instruction_sets()[1:])


def run_file(path: str, isa: str, keyword: str) -> None:
    """Runs the tests of `path` that `keyword` selects with FASTATTN_CPU_ISA=isa."""
    command = [sys.executable, "-m", "pytest", path, "-q", "-p", "no:cacheprovider", "-k", keyword]
    environment = os.environ | {"FASTATTN_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
