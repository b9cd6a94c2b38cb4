"""Compiles csrc/cuda with nvcc into one library: which file for which architectures, and how.

setup.py uses it, and tests/gates.py, which reads what ptxas said. No GPU and no CUDA build of torch
is needed here; torch headers are seen by csrc/bindings.cpp alone, which g++ compiles.

    FASTATTN_CUDA_ARCHS   such as "80;90": compute capabilities · 10; by default all that nvcc knows
    CUDA_HOME             its bin/nvcc is taken before the one on PATH
    MAX_JOBS              compilers at a time; by default ninja chooses
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import wgmma

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xptxas=-v",  # registers, shared memory, spills: tests/gates.py reads them
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-Xfatbin=-compress-all",
)


def find() -> str | None:
    for folder in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        if (file := shutil.which("nvcc", path=str(Path(folder) / "bin"))) is not None:
            return file
    return shutil.which("nvcc")


def architectures(nvcc: str) -> list[int]:
    if named := os.environ.get("FASTATTN_CUDA_ARCHS"):
        return sorted({int(word.rstrip("a")) for word in named.replace(",", ";").split(";")})
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = listed.stdout.split()
    return [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]


def targets(file: Path, archs: Iterable[int]) -> list[str]:
    """nvcc's -gencode options for a source. A name that ends in _sm75, _sm80 or _sm90 says what it
    is for: sm_75 alone, sm_80 and all later ones, sm_90a alone."""
    archs = sorted(archs)
    if file.stem.endswith("_sm75"):
        return [_gencode("75")]
    if file.stem.endswith("_sm90"):
        return [_gencode("90a")]
    if file.stem.endswith("_sm80"):
        archs = [arch for arch in archs if arch >= 80] or [80]
    newest = f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"  # for GPUs yet to come
    return [_gencode(str(arch)) for arch in archs] + [newest]


def _gencode(arch: str) -> str:
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def sources() -> list[Path]:
    return sorted(HERE.glob("*.cu"))


def build(
    library: Path | None, bindings_flags: Iterable[str] = (), link_flags: Iterable[str] = ()
) -> list[Path]:
    """Compiles every source, and links the library if it has a name. Returns ptxas' logs."""
    nvcc = find()
    assert nvcc is not None, "there is no nvcc"
    archs = architectures(nvcc)
    BUILD.mkdir(parents=True, exist_ok=True)
    wgmma.write(BUILD / "wgmma.cuh")
    objects = [BUILD / f"{file.stem}.o" for file in sources()]
    edges = [
        f"build {_path(o)}: nvcc {_path(file)}\n  targets = {' '.join(targets(file, archs))}"
        for o, file in zip(objects, sources(), strict=True)
    ]
    goals = list(objects)
    if library is not None:
        bindings = BUILD / "bindings.o"
        edges.append(f"build {_path(bindings)}: cxx {_path(ROOT / 'csrc' / 'bindings.cpp')}")
        inputs = " ".join(map(_path, [bindings, *objects]))
        goals = [BUILD / "library.so"]
        edges.append(f"build {_path(goals[0])}: link {inputs}")
    defines = f'-DFASTATTN_BUILT_FOR="{";".join(map(str, archs))}"'
    rules = f"""
rule nvcc
  command = {nvcc} {" ".join(NVCC_FLAGS)} -I. $targets -MD -MF $out.d -c $in -o $out $
    > $out.log 2>&1 || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
rule cxx
  command = {os.environ.get("CXX", "g++")} {" ".join(bindings_flags)} -DFASTATTN_CUDA -DUSE_CUDA $
    '{defines}' -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared -cudart=static -Xlinker=--exclude-libs=ALL $in -o $out $
    {" ".join(link_flags)}
"""
    (BUILD / "build.ninja").write_text(rules + "\n".join(edges) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    command = [_ninja(), "-C", str(BUILD), *jobs, *map(str, goals)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    if library is not None:
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(goals[0], library)
    return [o.with_suffix(".o.log") for o in objects]


def _ninja() -> str:
    """The one of this Python's environment, active or not, or else the one on PATH."""
    return shutil.which("ninja", path=str(Path(sys.executable).parent)) or "ninja"


def _path(path: Path) -> str:
    """As ninja writes it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
