"""Builds the library of the CUDA kernels that run in the emulator, with g++ alone.

    FASTATTN_EMULATE=$(python tests/emulated.py) FASTATTN_EMULATE_ARCH=75 python …

`backend="cuda"` then takes CPU tensors. Tests have that by their `backend` argument: see
conftest.py.
"""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path

from emulator import build as emulator
from torch.utils import cpp_extension

CSRC = Path(__file__).parent.parent / "csrc"


def why_not() -> str | None:
    """None, or why it can't be built here."""
    if sys.platform != "linux":
        return "the emulator is for Linux"
    if shutil.which(emulator.CXX) is None:
        return f"the emulator needs a C++ compiler and found no {emulator.CXX}"
    return None


@functools.cache
def build(csrc: Path = CSRC, name: str = "kernels", without: tuple[int, ...] = ()) -> Path:
    """The library, up to date; takes a minute the first time. `without` the kernels that are for
    sm_75, sm_80 or sm_90 alone."""
    flags = ["-DFASTATTN_CUDA", "-DFASTATTN_EMULATE", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f"-DFASTATTN_WITHOUT_SM{number}" for number in without]
    flags += [f"-iquote{csrc / 'cuda'}", f"-I{csrc}", f"-I{emulator.HERE}", "-Wno-attributes"]
    flags += [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    link = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    link += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    suffixes = tuple(f"_sm{number}" for number in without)
    kernels = [file for file in (csrc / "cuda").glob("*.cu") if not file.stem.endswith(suffixes)]
    return emulator.build(name, [*sorted(kernels), csrc / "bindings.cpp"], flags, link)


if __name__ == "__main__":
    print(build())
