"""Plants faults in kernels that the emulator runs: leaves out their barriers, waits and fences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emulator import build
from emulator.runtime import Library
from torch import Tensor


def unnoticed(library: Library, run: Callable[[], Sequence[Tensor]]) -> list[str]:
    """The places without which `run` raises no fault of the emulator and gives the same results."""
    library.passed_places()
    library.set_options("without=?")
    want = run()
    missed = []
    for place in library.passed_places():
        library.set_options(f"without={place}")
        try:
            got = run()
        except RuntimeError as error:
            if "emulator: " not in str(error):
                raise
        else:
            if all(g.equal(w) for g, w in zip(got, want, strict=True)):
                missed.append(place)
    library.set_options()
    return missed


def place_of(file: str, text: str) -> str:
    """Where this stands in a source of csrc/cuda, once."""
    lines = (build.ROOT / "csrc" / "cuda" / file).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if text in line)
    return f"{file}:{number}"
