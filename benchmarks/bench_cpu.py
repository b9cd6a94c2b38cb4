"""The CPU's table: attention, decoding and losses beside torch's, with the goal of each row.

    python benchmarks/bench_cpu.py               # = python -m benchmarks.bench_cpu
    python benchmarks/bench_cpu.py --isa avx2    # torch and fastattn both held to AVX2

cpu_table.py has the rows and the goals; this file only sets what torch reads when it is loaded.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

HELD = {  # by --isa: fastattn's kernels, torch's own, and the libraries of its matrix products
    "avx2": {
        "FASTATTN_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}


def environment(argv: list[str]) -> dict[str, str]:
    """What to set: threads bound to cores, as in `python -m benchmarks`, and --isa's set."""
    bound = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--isa")
    held = HELD.get(options.parse_known_args(argv)[0].isa, {})
    return {name: value for name, value in bound.items() if name not in os.environ} | held


if __name__ == "__main__":
    if not __package__:  # run as a file: again, as the package's module
        sys.path[0] = str(Path(__file__).resolve().parent.parent)
        runpy.run_module("benchmarks.bench_cpu", run_name="__main__", alter_sys=True)
        sys.exit()
    os.environ |= environment(sys.argv[1:])
    from .cpu_table import main

    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted; what was finished is on disk, and the same command goes on")
