"""Compiles CUDA sources with g++ into shared libraries that run them in the emulator.

By hand: python tests/emulator/build.py NAME SOURCE… prints the library's path.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "emulator"

JOBS = int(os.environ.get("MAX_JOBS", max(1, (os.cpu_count() or 1) // 2)))
CXX = os.environ.get("CXX", "g++")
COMMON = ["-std=c++17", "-fPIC", "-g1", "-fno-gnu-unique", "-ffp-contract=off", "-Wall", "-Wextra"]
# The emulator's mma is worth the machine's vector instructions.
HOST = [*COMMON, "-O2", "-ftree-vectorize", "-march=native"]
# Every load and store of a kernel outside of registers calls a hook of ours (hooks.cpp), and one
# that is misaligned another; the sanitizers' own run times would come in when linking. -O1 compiles
# in 60 % of -O2's time and runs as fast: most of a run is spent in the emulator.
KERNEL = [
    *COMMON,
    "-O1",
    "-fsanitize=thread,alignment",
    "--param=tsan-distinguish-volatile=1",
    "--param=tsan-instrument-func-entry-exit=0",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-unused-parameter",
    "-DFASTATTN_EMULATE",
    f"-I{HERE}",
    f"-I{ROOT / 'csrc' / 'cuda'}",
]


def build(
    name: str,
    sources: Iterable[Path | str],
    extra_flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
    emulator_flags: Sequence[str] = (),
) -> Path:
    """The shared library of these sources and the emulator, compiled where anything has changed.

    `.cu` files hold kernels and are instrumented; others (`.cpp`) are host code that isn't.
    `extra_flags` go to the compilation of the sources, `emulator_flags` to the emulator's.
    """
    compilations = [(HERE / "emulator.cpp", [*HOST, *emulator_flags])]
    for source in sources:
        flags = KERNEL if Path(source).suffix == ".cu" else HOST
        compilations.append((ROOT / source, [*flags, *extra_flags]))
    library = OUTPUT / f"lib{name}.so"
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with open(OUTPUT / "lock", "w") as lock, ThreadPoolExecutor(JOBS) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(_compile, *zip(*compilations, strict=True)))
        # -Bsymbolic: of two such libraries in one process each keeps to its own emulator.
        command = [CXX, "-shared", "-Wl,-Bsymbolic", "-o", str(library), *map(str, objects), "-ldl"]
        command += link_flags
        if _is_stale(library, command, objects):
            _run(library, command)
    return library


def _compile(source: Path, flags: list[str]) -> Path:
    """The object of `source`, in a file named after its path and flags: libraries share objects."""
    key = hashlib.sha256(shlex.join([CXX, *flags, str(source)]).encode()).hexdigest()[:10]
    target = OUTPUT / "objects" / f"{source.stem}-{key}.o"
    dependencies = target.with_suffix(".d")
    command = [CXX, *flags, "-MD", "-MF", str(dependencies), "-x", "c++", "-c", str(source)]
    command += ["-o", str(target)]
    needed = [source]
    if dependencies.exists():
        words = dependencies.read_text().replace("\\\n", " ").split()
        needed = [Path(word) for word in words[1:]]
    if not dependencies.exists() or _is_stale(target, command, needed):
        _run(target, command)
    return target


def _is_stale(target: Path, command: list[str], needed: Iterable[Path]) -> bool:
    """Whether `target` came from another command, or is older than something it needs."""
    if not target.exists() or _command_file(target).read_text() != shlex.join(command):
        return True
    made = target.stat().st_mtime_ns
    return any(not path.exists() or path.stat().st_mtime_ns > made for path in needed)


def _run(target: Path, command: list[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        target.unlink(missing_ok=True)
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    sys.stderr.write(done.stderr)
    _command_file(target).write_text(shlex.join(command))


def _command_file(target: Path) -> Path:
    return target.with_suffix(target.suffix + ".cmd")


if __name__ == "__main__":
    print(build(sys.argv[1], sys.argv[2:]))
