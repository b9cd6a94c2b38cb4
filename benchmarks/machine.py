"""Everything a reader needs to judge figures: device, driver, ISA, threads, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn import library
from fastattn.flops import gpu_peak
from fastattn.info import cpu_info, installed_version

PACKAGES = [
    "triton",
    "flash-attn",
    "flash-attn-4",
    "xformers",
    "flashinfer-python",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "transformers",
    "numpy",
]
VARIABLES = ("FASTATTN_", "OMP_", "MKL_", "ONEDNN_", "ATEN_", "THP_", "CUDA_", "TORCH_", "PYTORCH_")


def describe(device: torch.device) -> dict[str, Any]:
    """The stamp of a results file."""
    info = cpu_info()
    stamp: dict[str, Any] = {
        "kind": "",
        "device": device.type,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": " ".join((info.get("model name") or platform.processor() or "unknown").split()),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "fastattn": fastattn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "packages": {name: v for name in PACKAGES if (v := installed_version(name))},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        peak = gpu_peak(properties.name)
        stamp |= {
            "gpu": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": nvidia_smi("driver_version"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "data_sheet_flops": None if peak is None else peak.flops,
        }
    stamp["kind"] = kind(stamp)
    return stamp


def kind(stamp: dict[str, Any]) -> str:
    """The folder of results that may be compared: "nvidia-h200", "amd-epyc-avx512-2-threads".

    Where torch runs another instruction set than ours (one of the two was held), it says so, too.
    """
    words = stamp.get("gpu") or f"{stamp['cpu']} {stamp['isa']} {stamp['threads']} threads"
    if "gpu" not in stamp:
        theirs = stamp["torch_isa"].lower()  # "avx512", "avx2", "default"
        words += "" if stamp["isa"].startswith(("none", theirs)) else f" torch {theirs}"
    words = re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b|@.*GHz", " ", words, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def isa() -> str:
    try:
        return library.cpu_isa()
    except RuntimeError:
        return "none"


def commit() -> str:
    """The short hash, with a + behind it where sources differ from it.

    In a copy without git's folder, or without git, what FASTATTN_COMMIT says.
    """
    head = git("rev-parse", "--short", "HEAD")
    if head is None:
        return os.environ.get("FASTATTN_COMMIT", "unknown")
    sources = ["..", ":!../benchmarks/results", ":!../docs", ":!../README.md"]
    return head + ("+" if git("status", "--porcelain", "-uno", "--", *sources) else "")


def git(*words: str) -> str | None:
    where = Path(__file__).parent
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=where)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def clocks(device: torch.device) -> dict[str, Any]:
    """The clock rates now, in MHz; on a GPU also what it draws and how hot it is."""
    if device.type == "cpu":
        mhz = cpu_info().get("cpu MHz")
        return {"cpu_mhz": None if mhz is None else float(mhz)}
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    names = ("sm_mhz", "memory_mhz", "watts", "celsius")
    found = (nvidia_smi(fields) or "").split(",")
    return dict(zip(names, [number(x) for x in found], strict=False))


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def nvidia_smi(fields: str) -> str | None:
    """A query about the first GPU, or None where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
