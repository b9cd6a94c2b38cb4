"""Keeps a run going when a kernel takes the process, or the GPU's context, down with it.

The run is a child process that notes what it is about to try. When it dies, or shows no sign of
life, the one it was trying is written down as lost in the results file and a new child goes on with
the rest. For GPUs: there, one bad address or a barrier that nobody reaches ends everything.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastattn.files import read_json, write_json

from . import results, unbound

STALLED_SECONDS = 60.0  # longer than starting, and than any case's exact result
COMPILING_SECONDS = 150.0  # longer than any compilation
DEVICE_LOST = 3  # the exit status of a child that can't use the device any more
POLL_SECONDS = 0.2


class DeviceLostError(RuntimeError):
    """Every later call would fail, too."""


def note_path(out: Path) -> Path:
    return out.with_name(f".{out.stem}-trying.json")


def note(out: Path, suite: str, case: str, dtype: str, peer: str, compiles: bool) -> None:
    """What is tried from now on; peer "" is the timing of all."""
    key = {"suite": suite, "case": case, "dtype": dtype, "peer": peer}
    write_json(note_path(out), {"key": key, "compiles": compiles})


def supervise(
    command: Callable[[float | None], Sequence[str]],
    out: Path,
    budget: float | None,
    stalled: float = STALLED_SECONDS,
) -> int:
    """Runs command(seconds left) until a child ends by itself; returns its exit status."""
    begin = time.monotonic()
    try:
        while True:
            left = None if budget is None else budget - (time.monotonic() - begin)
            ended = run_child(command(left), out, stalled)
            if isinstance(ended, int):
                return ended
            if not note_path(out).exists():  # it died before it tried anything
                print(f"bench: {ended}")
                return 1
            lost = read_json(note_path(out))["key"] | {"reason": ended}
            note_path(out).unlink()
            print(f"bench: lost {lost['peer'] or 'the timing'} on {lost['case']}: {ended}")
            document = results.read(out)
            document["lost"] = [*document.get("lost", []), lost]
            results.write(out, document)
    finally:
        note_path(out).unlink(missing_ok=True)


def run_child(command: Sequence[str], out: Path, stalled: float) -> int | str:
    """Its exit status, or how it was lost."""
    child = subprocess.Popen(command, **unbound())
    begin = time.time()
    try:
        while (status := child.poll()) is None:
            time.sleep(POLL_SECONDS)
            alive = max([begin, *(p.stat().st_mtime for p in (out, note_path(out)) if p.exists())])
            compiles = note_path(out).exists() and read_json(note_path(out))["compiles"]
            limit = max(stalled, COMPILING_SECONDS) if compiles else stalled
            if time.time() - alive > limit:
                return f"no sign of life for {limit:.0f} s"
    finally:
        child.kill()
        child.wait()
    if status == DEVICE_LOST:
        return "the device was lost"
    return f"killed by signal {-status}" if status < 0 else status
