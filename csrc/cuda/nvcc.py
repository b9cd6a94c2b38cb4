"""Compiles csrc/cuda with nvcc into one library: which file for which architectures, and how.

setup.py uses it, and tests/gates.py, which reads what ptxas said. No GPU and no CUDA build of torch
is needed here; torch headers are seen by csrc/bindings.cpp alone, which g++ compiles.

    FASTATTN_CUDA_ARCHS   such as "80;90" or "8.0 9.0a"; by default all that nvcc knows
    CUDA_HOME             its bin/nvcc is taken before the one on PATH
    MAX_JOBS              compilers at a time; by default ninja chooses
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
# The LibTorch stable ABI as of torch 2.11: one library for every later torch and every Python.
TORCH_TARGET = "0x020b000000000000"
BINDINGS_FLAGS = ("-std=c++17", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}")


def find() -> str | None:
    for folder in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        if (file := shutil.which("nvcc", path=str(Path(folder) / "bin"))) is not None:
            return file
    return shutil.which("nvcc")


def architectures(nvcc: str) -> list[int]:
    if named := os.environ.get("FASTATTN_CUDA_ARCHS"):
        words = re.split(r"[;,\s]+", named.strip())
        numbers = [re.fullmatch(r"(\d+)\.?(\d)[af]?", word) for word in words]
        archs = sorted({int(n[1] + n[2]) for n in numbers if n is not None})
        if None in numbers or archs[0] < 75:
            sys.exit(f"FASTATTN_CUDA_ARCHS={named}: not like 80;90 or 8.0;9.0, each 75 or more")
        return archs
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = listed.stdout.split()
    return [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]


def generation(file: Path) -> int | None:
    """75, 80 or 90 where the name ends in _sm75 (for sm_75 alone), _sm80 (for sm_80 and all later
    ones) or _sm90 (for sm_90a alone)."""
    _, mark, number = file.stem.rpartition("_sm")
    return int(number) if mark else None


def targets(file: Path, archs: Iterable[int]) -> list[str]:
    """nvcc's -gencode options for a source; none for one that no architecture of `archs` takes."""
    archs, own = sorted(archs), generation(file)
    if own in (75, 90):
        name = {75: "75", 90: "90a"}[own]
        return [f"-gencode=arch=compute_{name},code=sm_{name}"] if own in archs else []
    archs = [arch for arch in archs if arch >= (own or 0)]
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if archs:  # and PTX for GPUs yet to come
        options.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return options


def sources() -> list[Path]:
    """Those that take longest first: with few compilers at a time, they then end together."""
    return sorted(HERE.glob("*.cu"), key=lambda file: (-(generation(file) or 0), file))


def torch_flags(torch, cpp_extension) -> tuple[list[str], list[str]]:
    """To compile the bindings with, and to link the library with."""
    flags = ["-O2", "-fPIC", "-Wall", *BINDINGS_FLAGS]
    flags += [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    # libtorch.so brings libtorch_cuda.so along wherever torch is a CUDA build.
    libraries = ["torch", "torch_cpu"] + (["torch_cuda"] if torch.version.cuda else [])
    link = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    link += ["-Xlinker=--no-as-needed", *(f"-l{name}" for name in libraries)]
    return flags, link


class Step(NamedTuple):
    """A command that makes `target`; compilers list what they have read in target.d."""

    target: Path
    inputs: list[Path]
    command: list[str]
    log: Path | None = None  # where its output goes
    compiles: bool = True


def build(
    library: Path | None,
    bindings_flags: Iterable[str] = (),
    link_flags: Iterable[str] = (),
    files: Iterable[Path] | None = None,
    folder: Path = BUILD,
) -> list[Path]:
    """Compiles the sources, or `files`, in `folder`, and links the library if it has a name.
    Returns ptxas' logs."""
    nvcc = find()
    assert nvcc is not None, "there is no nvcc"
    archs = architectures(nvcc)
    folder.mkdir(parents=True, exist_ok=True)
    wgmma.write(folder / "wgmma.cuh")

    def compiled(target: Path, source: Path, command: list[str], log: Path | None = None) -> Step:
        reads = ["-MD", "-MF", f"{target}.d", "-c", str(source), "-o", str(target)]
        return Step(target, [source], command + reads, log)

    left_out = {generation(file) for file in sources() if not targets(file, archs)}
    without = [f"-DFASTATTN_WITHOUT_SM{number}" for number in sorted(filter(None, left_out))]
    flags = [*NVCC_FLAGS, f"-I{folder}", *without]
    steps = []
    for source in sources() if files is None else files:
        if options := targets(source, archs):
            target = folder / f"{source.stem}.o"
            command = [nvcc, *flags, *options]
            steps.append(compiled(target, source, command, target.with_suffix(".o.log")))
    logs = [step.log for step in steps if step.log]
    if library is not None:
        defines = ["-DFASTATTN_CUDA", "-DUSE_CUDA"]
        defines.append(f'-DFASTATTN_BUILT_FOR="{";".join(map(str, archs))}"')
        command = [os.environ.get("CXX", "g++"), *bindings_flags, *defines]
        steps.append(compiled(folder / "bindings.o", ROOT / "csrc" / "bindings.cpp", command))
        objects = [step.target for step in steps]
        linked = folder / "library.so"
        link = [nvcc, "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
        link += [*map(str, objects), "-o", str(linked), *link_flags]
        steps.append(Step(linked, objects, link, compiles=False))
    _run(steps, folder)
    if library is not None:
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(linked, library)
    return logs


def _run(steps: list[Step], folder: Path) -> None:
    """By ninja, which does what is out of date; where there is none, all of them."""
    jobs = int(os.environ.get("MAX_JOBS", 0))
    # that of this Python's environment, active or not, comes first
    ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    if ninja is None:
        with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            list(pool.map(_run_step, [step for step in steps if step.compiles]))
        for step in steps:
            if not step.compiles:
                _run_step(step)
        return
    line = ["  command = $line", "  description = $out"]
    lines = ["rule compile", *line, "  depfile = $out.d", "  deps = gcc", "rule link", *line]
    for step in steps:
        rule, inputs = "compile" if step.compiles else "link", " ".join(map(_path, step.inputs))
        lines.append(f"build {_path(step.target)}: {rule} {inputs}")
        lines.append(f"  line = {_shell_line(step).replace('$', '$$')}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [ninja, "-C", str(folder), *(["-j", str(jobs)] if jobs else [])]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _shell_line(step: Step) -> str:
    line = shlex.join(step.command)
    if step.log is None:
        return line
    log = shlex.quote(str(step.log))
    return f"{line} > {log} 2>&1 || (cat {log}; exit 1)"


def _run_step(step: Step) -> None:
    subprocess.run(_shell_line(step), shell=True, check=True, stdout=sys.stderr)


def _path(path: Path) -> str:
    """As ninja writes it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
