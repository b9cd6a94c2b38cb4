"""`fastattn info`: the machine, and which of fastattn's backends run on it and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, backend_triton, library, proof
from .backends import TABLE

EXTRAS = {
    "train": ("safetensors", "tiktoken", "tyro", "rich", "matplotlib", "tensorboard"),
    "integrations": ("transformers",),
}

Line = tuple[str, str]  # label, text
Section = tuple[str, list[Line]]


def report() -> str:
    """All sections as text, labels in a column. Works with any part of the package missing."""
    lines = [f"fastattn {__version__}"]
    for title, rows in sections():
        width = max(len(label) for label, _ in rows) + 2
        lines += ["", title]
        for label, text in rows:
            head, *more = text.split("\n")
            lines.append(f"  {label:<{width}}{head}")
            lines += [f"  {'':<{width}}{line}" for line in more]
    return "\n".join(lines)


def sections() -> Iterator[Section]:
    yield "machine", machine()
    yield "torch", torch_build()
    yield "backends, in order of preference", backends()
    yield "optional packages", optional_packages()


# ---- machine -----------------------------------------------------------------------------------


def cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo, empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def usable_cores() -> int:
    """The cores this process may run on, which containers often limit."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def machine() -> list[Line]:
    cpu = cpu_info()
    rows = [
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("processor", cpu.get("model name") or platform.processor() or "unknown"),
        ("cores", f"{usable_cores()} usable of {os.cpu_count()}"),
    ]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        rows.append(("memory", f"{gib:.1f} GiB"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            text = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB"
            rows.append((f"cuda:{i}", text))
    rows.append(("AMX tiles", amx_note(cpu.get("flags", ""))))
    return rows


def amx_note(flags: str) -> str:
    """What matrix tiles mean for the choice between fastattn and torch in bf16."""
    if "amx_tile" not in flags.split():
        return "none, so fastattn's vector kernels are the choice in bf16 too"
    return (
        "present, and fastattn's kernels don't use them: in bf16, torch's own SDPA and its brgemm "
        "products\nmay be faster here. In fp32, tiles play no part."
    )


# ---- torch and backends ------------------------------------------------------------------------


def torch_build() -> list[Line]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    device = "a device is ready" if torch.cuda.is_available() else "no device"
    return [
        ("version", torch.__version__),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)"),
        ("CUDA", f"{cuda}, {device}"),
    ]


def backends() -> list[Line]:
    rows = []
    for row in TABLE:
        reason = row.unusable()
        verdict = f"usable · {row.summary}" if reason is None else f"not usable: {reason}"
        rows.append((row.name, verdict))
        if row.name == "cpu" and reason is None:
            rows.append(("", cpu_isa()))
        if row.name == "cuda" and reason is None:
            rows.append(("", cuda_target()))
        if row.name == "triton" and reason is None:
            rows.append(("", triton_version()))
        if row.name in proof.ON_GPUS and reason is None and torch.cuda.is_available():
            rows.append(("", proofs(row.name)))
    if forced := os.environ.get("FASTATTN_BACKEND"):
        known = forced in {row.name for row in TABLE}
        rows.append(("forced", f"FASTATTN_BACKEND={forced}" + ("" if known else " is no backend")))
    return rows


def cpu_isa() -> str:
    """The instruction set in use and which could be."""
    forced = os.environ.get("FASTATTN_CPU_ISA")
    try:
        chosen, *others = library.instruction_sets()
    except RuntimeError as error:
        return f"instruction set: {error}"
    if forced:
        return f"instruction set: {chosen} (FASTATTN_CPU_ISA forces it)"
    return f"instruction set: {chosen}; FASTATTN_CPU_ISA can force {', '.join(others) or chosen}"


def cuda_target() -> str:
    """Where the CUDA kernels run and what they are built for."""
    if library.emulated():
        arch = os.environ.get("FASTATTN_EMULATE_ARCH", "80")
        return f"in the emulator of FASTATTN_EMULATE, as on sm_{arch}; only if asked for"
    built = [f"sm_{arch}" for arch in library.cuda_architectures()]
    return f"built for {', '.join(built)} and later ones"


def triton_version() -> str:
    """Triton's version, and whether it interprets."""
    where = " in its interpreter; only if asked for" if backend_triton.interpreted() else ""
    return f"triton {installed_version('triton')}{where}"


def proofs(backend: str) -> str:
    """What was proved on the current GPU."""
    passed = proof.proved(backend, torch.device("cuda", torch.cuda.current_device()))
    missing = [kind for kind in proof.KIND_OF.values() if kind not in passed]
    if not missing:
        return "proved on this GPU, so chosen by itself"
    return f"only if asked for, until `fastattn check` has proved on this GPU: {', '.join(missing)}"


# ---- packages ----------------------------------------------------------------------------------


def optional_packages() -> list[Line]:
    rows = []
    for extra, names in EXTRAS.items():
        versions = {name: installed_version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        text = " · ".join(f"{name} {version}" for name, version in versions.items() if version)
        if missing:
            text = " · ".join(filter(None, (text, "missing: " + ", ".join(missing))))
            if extra == "train":
                text += "  (pip install 'fastattn[train]')"
        rows.append((extra, text))
    return rows


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
