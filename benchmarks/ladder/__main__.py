"""Climbs the ladder: `python -m benchmarks.ladder` where there is a GPU and nvcc.

It compiles the rungs that this GPU can run, holds them to fp64, times them beside torch's SDPA and
fastattn's kernel, writes a results file as the other benchmarks do, and prints the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .. import cli, machine, results
from . import emulation, table


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__)
    p.add_argument("--emulate", action="store_true", help="small shapes on the emulator instead")
    p.add_argument("--compile", action="store_true", help="only compile, and print the table")
    p.add_argument("--readme", action="store_true", help="only write the table into README.md")
    p.add_argument("--out", type=Path, default=results.RESULTS, help="a folder")
    a = p.parse_args(argv)
    if a.emulate:
        for line in emulation.lines():
            print(line, flush=True)
        return 0
    if a.readme:
        print(f"wrote {table.write()}")
        return 0
    if not a.compile:
        if not torch.cuda.is_available():
            print("ladder: torch finds no CUDA device; --emulate and --compile need none")
            return 1
        stamp = machine.describe(torch.device("cuda"))
        out = results.path_of(a.out, stamp)
        out = out.with_name(f"{out.stem}-ladder.json")
        if status := cli.main(["--device", "cuda", "--suite", "ladder", "--out", str(out)]):
            return status
    print("\n".join(table.lines(a.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
