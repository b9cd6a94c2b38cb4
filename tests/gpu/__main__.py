"""All that only a machine with a GPU can show, in one command: `make gpu`.

    build      the CUDA kernels for this GPU alone, by nvcc
    calibrate  every function of ptx*.cuh, on the GPU and in the emulator, bit for bit
    test       the shared grid and the public tests on device tensors, against float64
    triton     a few cases of the Triton kernels, likewise; `fastattn check` goes over all
    sanitize   compute-sanitizer's memcheck, racecheck and synccheck over a few cases
    bench      the benchmarks, the most telling first, then the ladder (benchmarks/ladder)

Needs torch with CUDA and nvcc; g++ for the emulator. No network. Steps that passed with the same
sources are not done again, unless with --again; each is on disk when it ends. What is missing here
is skipped and said. Results: RESULTS/<device>/gpu-<commit>.json, and the benchmarks' own beside it.
In a copy without git, set FASTATTN_COMMIT.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gpu import journal, parts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", help="which parts; default: all, in this order")
    parser.add_argument("--again", action="store_true", help="also what passed before")
    parser.add_argument("--minutes", type=float, default=9.5, help="to end within")
    parser.add_argument("--results", type=Path, default=journal.ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--dry-run", action="store_true", help="with the emulator in place of a GPU, little of each"
    )
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.part) - set(parts.PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; {', '.join(parts.PARTS)} are")
    deadline = time.monotonic() + 60 * arguments.minutes
    target = parts.Emulated() if arguments.dry_run else parts.Gpu.find()
    if isinstance(target, str):
        print(f"make gpu: {target}")
        return 1
    target.results, target.again = arguments.results.resolve(), arguments.again
    stamp = journal.machine(target.device, target.arch, target.nvcc)
    folder = arguments.results / journal.file_name_of(target.device)
    book = journal.Journal(folder / f"gpu-{stamp['commit'] or stamp['sources']}.json", stamp)
    print(f"{target.device}, sm_{target.arch}, sources {stamp['sources']}: {book.file}")
    for part in arguments.part or parts.PARTS:
        steps = parts.PARTS[part](target)
        journal.run_part(part, steps, book, deadline, arguments.again)
    print("\n" + journal.summary(book))
    return 1 if book.of_state("failed") else 2 if book.of_state("cut") else 0


if __name__ == "__main__":
    sys.exit(main())
