"""The steps of `make gpu`, and the two things they run on: a GPU, or the emulator in its place."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import emulated
import gates
import torch
from torch.utils import cpp_extension

from fastattn import proof
from gpu import calibration
from gpu.journal import ROOT, Outcome, Step, version_of

sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc

BUILD = ROOT / "build" / "gpu"
# Small, and between them every kernel and every feature: D 16 … 256, masks, GQA, packed, paged.
SANITIZED = (
    "lengths-17-17", "causal", "gqa-4-causal", "window-both", "dim-96", "dim-192", "dim-256",
    "mask-empty-rows", "everything", "packed-everything", "strides-padded", "no-keys-sinks",
    "splits-5", "mha", "mqa", "append-5-causal", "paged-everything", "dim-3",
    "plain", "vocab-1000", "weight-smoothing", "padded", "softcap",
)  # fmt: skip
SANITIZED_KINDS = ("attention", "decode", "cross_entropy")  # these have all kernels
# What Triton compiles on the way: every kernel, plain and with all options.
COMPILED = (
    "causal", "gqa-4-causal", "dim-256", "everything", "packed-everything", "splits-5",
    "paged-everything", "plain", "weight-smoothing", "softcap",
)  # fmt: skip
TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "synccheck": [],
    "initcheck": [],
}


def python_path() -> str:
    """Of links that are the package as it would be installed, its subpackages of other folders too:
    nothing needs to be installed where there is no network."""
    package = BUILD / "packages" / "fastattn"
    package.mkdir(parents=True, exist_ok=True)
    inside = [file for file in (ROOT / "fastattn").iterdir() if file.name != "__pycache__"]
    links = {file.name: file for file in inside} | {
        "kernels": ROOT / "kernels",
        "bundled": ROOT / "data",
    }
    links["_cuda.abi3.so"] = ROOT / "fastattn" / "_cuda.abi3.so"  # once it is built
    for name, file in links.items():
        (package / name).unlink(missing_ok=True)
        (package / name).symlink_to(file)
    return f"{package.parent}:{ROOT}:{ROOT / 'tests'}"


class Gpu:
    """The GPU that torch calls cuda:0."""

    test_options = ("-m", "gpu", "--backend", "cuda")
    case_options: tuple[str, ...] = ()
    sanitized = SANITIZED
    tools = tuple(TOOLS)
    results = ROOT / "benchmarks" / "results"
    again = False  # also what passed before

    def __init__(self, device: str, arch: int, nvcc: str) -> None:
        self.device, self.arch, self.nvcc = device, arch, nvcc
        self.environment = os.environ | {"PYTHONPATH": python_path()}

    @staticmethod
    def find() -> Gpu | str:
        """The GPU, or what is missing."""
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA: set PYTHON to one that has it"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if (compiler := nvcc.find()) is None:
            return "there is no nvcc in CUDA_HOME or on PATH"
        major, minor = torch.cuda.get_device_capability(0)
        return Gpu(torch.cuda.get_device_name(0), 10 * major + minor, compiler)

    def build_kernels(self, seconds: float) -> Outcome:
        os.environ["FASTATTN_CUDA_ARCHS"] = str(self.arch)
        library = ROOT / "fastattn" / "_cuda.abi3.so"
        logs = nvcc.build(library, *nvcc.torch_flags(torch, cpp_extension))
        kernels = [kernel for log in logs for kernel in gates.kernels_of(log)]
        here = [k for k in kernels if k.arch.rstrip("a") == f"sm_{self.arch}"]
        spilling = sum(bool(k.spills) for k in here)
        size = library.stat().st_size / 2**20
        text = f"{len(here)} kernels for sm_{self.arch}, {spilling} spill; {size:.1f} MiB"
        return Outcome("passed" if here else "failed", text)

    def build_probes(self) -> Path:
        return calibration.compile_for_gpu(self.nvcc, self.arch, BUILD / "libcalibration.so")

    def sanitizer(self, tool: str) -> list[str] | None:
        """What goes before a command, or None if it isn't there."""
        found = gates.find_tool("compute-sanitizer")
        return found and [found, "--tool", tool, "--error-exitcode", "9", *TOOLS[tool]]

    def test_files(self) -> list[Path]:
        """Those with tests of backends or of GPUs."""
        wanted = re.compile(r"def test_\w+\([^)]*\bbackend\b|mark\.gpu")
        files = sorted((ROOT / "tests").glob("test_*.py"))
        return [file for file in files if wanted.search(file.read_text())]


class Emulated:
    """The emulator in place of a GPU, to try everything else: a little of each part."""

    device, arch, nvcc = "dry-run", 80, None
    test_options = ("--backend", "cuda-sm80", "--device", "pretend", "-k", "cuda-sm80 and dim-1-")
    sanitized = ("causal", "splits-5", "plain")
    tools = ("memcheck",)
    results = BUILD
    again = False  # also what passed before

    def __init__(self) -> None:
        self.case_options = ("--device", "cpu")
        self.environment = os.environ | {
            "PYTHONPATH": python_path(),
            "FASTATTN_EMULATE_ARCH": str(self.arch),
        }

    def build_kernels(self, seconds: float) -> Outcome:
        return Outcome("passed", str(emulated.build()))

    def build_probes(self) -> Path:
        return calibration.compile_for_emulator()

    def sanitizer(self, tool: str) -> list[str] | None:
        self.environment["FASTATTN_EMULATE"] = str(emulated.build())
        return []

    def test_files(self) -> list[Path]:
        return [ROOT / "tests" / "test_attention.py"]


Target = Gpu | Emulated


def run(target: Target, command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """The command's output is stdout; TimeoutExpired when it takes longer: then it is killed, and
    what it has started too. It does not run in the repository's root, where Python would look for
    packages first."""
    process = subprocess.Popen(
        command,
        cwd=BUILD,
        env=target.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


# --- build ----------------------------------------------------------------------------------------


def build_steps(target: Target) -> list[Step]:
    return [
        Step("kernels", target.build_kernels, always=True),
        Step("load", partial(load_kernels, target), always=True),
    ]


def load_kernels(target: Target, seconds: float) -> Outcome:
    """In a process of its own, as the tests will."""
    if isinstance(target, Emulated):
        return Outcome("skipped", "there is nothing to load for a GPU")
    code = "from fastattn import library, info; print(library.cuda_load_error() or info.report())"
    done = run(target, [sys.executable, "-c", code], seconds)
    loaded = done.returncode == 0 and f"built for sm_{target.arch}" in done.stdout
    return Outcome("passed" if loaded else "failed", done.stdout)


# --- calibrate ------------------------------------------------------------------------------------


def calibrate_steps(target: Target) -> list[Step]:
    """A step a function; the libraries are compiled by the first that needs them."""
    if (reason := emulated.why_not()) is not None:
        return [Step("all", lambda seconds: Outcome("skipped", reason))]
    loaded: list[calibration.Library] = []

    def libraries() -> list[calibration.Library]:
        if not loaded:
            paths = target.build_probes(), calibration.compile_for_emulator()
            loaded.extend(map(calibration.Library, paths))
        return loaded

    def calibrate(name: str, seconds: float) -> Outcome:
        torch.manual_seed(0)
        gpu, ours = libraries()
        differences = calibration.compare(name, gpu, ours)
        wrong = [str(d) for d in differences if not d.passed]
        detail = {"differences": [d._asdict() for d in differences]}
        text = "\n".join(wrong or [str(max(differences, key=lambda d: d.largest))])
        return Outcome("failed" if wrong else "passed", text, detail)

    return [Step(name, partial(calibrate, name)) for name in calibration.probes(target.arch)]


# --- test -----------------------------------------------------------------------------------------


def test_steps(target: Target) -> list[Step]:
    """A step a file, by pytest; without pytest the shared grid alone."""
    if version_of("pytest") is None:
        kinds = proof.KIND_OF.values()
        return [Step(f"grid-{kind}", partial(check_grid, target, kind)) for kind in kinds]
    return [Step(f.stem, partial(run_tests, target, f)) for f in target.test_files()]


def check_grid(target: Target, kind: str, seconds: float) -> Outcome:
    command = [sys.executable, "-m", "fastattn.check", kind, *target.case_options]
    done = run(target, command, seconds)
    text = f"there is no pytest here, so the shared grid alone ran\n{done.stdout[-4000:]}"
    return Outcome("passed" if done.returncode == 0 else "failed", text)


def run_tests(target: Target, file: Path, seconds: float) -> Outcome:
    BUILD.mkdir(parents=True, exist_ok=True)
    report = BUILD / f"{file.stem}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    command += ["--tb=short", "--maxfail=40", f"--junitxml={report}", *target.test_options]
    done = run(target, command, seconds)
    if not report.exists() or done.returncode not in (0, 1, 5):
        return Outcome("failed", done.stdout[-4000:])
    return outcome_of(report)


def outcome_of(report: Path) -> Outcome:
    """What a junit file says: failures with their messages."""
    suite = ElementTree.parse(report).getroot()
    count = skipped = 0
    failures = []
    for case in suite.iter("testcase"):
        count += 1
        skipped += case.find("skipped") is not None
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                message = (found.get("message") or found.text or "").strip()
                failures.append(f"{case.get('name')}: {message[:600]}")
    text = f"{count - skipped - len(failures)} passed, {skipped} skipped, {len(failures)} failed"
    detail = {"tests": count, "skipped": skipped, "failures": failures}
    if failures:
        return Outcome("failed", "\n  ".join([text, *failures[:20]]), detail)
    if count == skipped:
        return Outcome("skipped", f"no test ran: {text}", detail)
    return Outcome("passed", text, detail)


# --- triton ---------------------------------------------------------------------------------------


def triton_steps(target: Target) -> list[Step]:
    return [Step("cases", partial(check_triton, target), 240)]


def check_triton(target: Target, seconds: float) -> Outcome:
    """Few: each takes seconds to compile. `fastattn check` goes over all."""
    if isinstance(target, Emulated) or version_of("triton") is None:
        return Outcome("skipped", "there is no Triton here, or no GPU for it")
    command = [sys.executable, "-m", "fastattn.check", "--backend", "triton", "--names", *COMPILED]
    done = run(target, command, seconds)
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    text = "\n".join([*failures[:20], *done.stdout.strip().splitlines()[-1:]])
    return Outcome("passed" if done.returncode == 0 else "failed", text)


# --- sanitize -------------------------------------------------------------------------------------


def sanitize_steps(target: Target) -> list[Step]:
    return [Step(tool, partial(sanitize, target, tool), 150) for tool in target.tools]


def sanitize(target: Target, tool: str, seconds: float) -> Outcome:
    prefix = target.sanitizer(tool)
    if prefix is None:
        return Outcome("skipped", "there is no compute-sanitizer beside nvcc or on PATH")
    command = [*prefix, sys.executable, "-m", "fastattn.check", *SANITIZED_KINDS, "--only-run"]
    command += ["--names", *target.sanitized]
    # Without torch's cache every tensor is an allocation of its own, with bounds to watch.
    target.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    done = run(target, [*command, *target.case_options], seconds)
    if done.returncode == 0:
        return Outcome("passed", done.stdout.strip().splitlines()[-1])
    return Outcome("failed", f"exit {done.returncode}\n{worst_of(done.stdout)}")


def worst_of(output: str) -> str:
    """The first reports of compute-sanitizer, and the end."""
    reports = [line for line in output.splitlines() if line.startswith("=========")]
    return "\n".join([*reports[:40], "…", output[-1000:]])


# --- bench ----------------------------------------------------------------------------------------


def bench_steps(target: Target) -> list[Step]:
    """The kernels first, should no other part have built them; the ladder where time is left."""
    return [
        Step("kernels", target.build_kernels, always=True),
        Step("benchmarks", partial(bench, target), 600),
        Step("ladder", partial(climb, target), 150),
    ]


def climb(target: Target, seconds: float) -> Outcome:
    """`python -m benchmarks.ladder`, which also writes results of its own."""
    command = [sys.executable, "-m", "benchmarks.ladder"]
    command += ["--emulate"] if isinstance(target, Emulated) else ["--out", str(target.results)]
    done = run(target, command, seconds)
    return Outcome("passed" if done.returncode == 0 else "failed", done.stdout[-4000:])


def bench(target: Target, seconds: float) -> Outcome:
    """`python -m benchmarks`, the most telling cases first; it writes results of its own, and goes
    on with those of an earlier call. Pictures are for `bench report`, later."""
    from benchmarks.cli import LEFT_OUT
    from benchmarks.suites import SUITES

    command = [sys.executable, "-m", "benchmarks", "--out", str(target.results), "--no-pictures"]
    command += ["--suite", *(suite for suite in SUITES if suite != "ladder")]
    command += [] if target.again else ["--resume"]
    if isinstance(target, Emulated):
        command += ["--device", "cpu", "--list"]
    else:  # loading torch and ending take time too
        command += ["--device", "cuda", "--budget", f"{max(seconds - 45, 20):.0f}"]
    done = run(target, command, seconds)
    last = done.stdout[-8000:]
    if done.returncode != 0:
        return Outcome("failed", last)
    if (cut := re.search(f".*{LEFT_OUT}.*", last)) is not None:
        return Outcome("cut", f"{cut[0]}: run it again to go on\n{last}")
    return Outcome("passed", last)


PARTS: dict[str, Callable[[Target], list[Step]]] = {
    "build": build_steps,
    "calibrate": calibrate_steps,
    "test": test_steps,
    "triton": triton_steps,
    "sanitize": sanitize_steps,
    "bench": bench_steps,
}
