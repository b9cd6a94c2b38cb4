"""Which kernels have been proved on which GPU. Others are not chosen there, unless asked for.

`fastattn check` holds the kernels to float64 on the GPU at hand, one kind of problem after another.
What passes is kept in FASTATTN_CACHE or ~/.cache/fastattn, by device, with a hash of the kernels:
others than those that passed, or another GPU, are not proved by it.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from . import backends, files
from .backends import Backend, Problem
from .problem import (
    AttentionProblem,
    CrossEntropyProblem,
    DecodeProblem,
    LinearCrossEntropyProblem,
)

KIND_OF = {
    AttentionProblem: "attention",
    DecodeProblem: "decode",
    CrossEntropyProblem: "cross_entropy",
    LinearCrossEntropyProblem: "linear_cross_entropy",
}
ON_GPUS = ("cuda", "triton")
PATIENCE = 120.0  # seconds that a case may take; Triton compiles its kernels in them


# --- what is known --------------------------------------------------------------------------------


def missing(backend: str, p: Problem) -> str | None:
    """None, or why `backend` isn't chosen by itself for `p` on the GPU that has it."""
    if KIND_OF[type(p)] in proved(backend, p[0].device):
        return None
    return (
        "it has not been proved on this GPU: `fastattn check` does that, once;"
        f" backend={backend!r} asks for it all the same"
    )


@functools.cache
def proved(backend: str, device: torch.device) -> frozenset[str]:
    """The kinds of problems that `backend`'s kernels, as they are, have passed on the device."""
    known = files.read_cache(file()).get(device_name(device), {}).get(backend)
    if not isinstance(known, dict) or known.get("kernels") != backends.row(backend).fingerprint():
        return frozenset()
    return frozenset(known.get("kinds", ()))


def all_proved(backend: str, device: torch.device) -> bool:
    """Whether `backend` is there and has passed every kind of problem on the device."""
    usable = backends.row(backend).unusable() is None
    return usable and proved(backend, device) == set(KIND_OF.values())


def keep(backend: str, device: torch.device, kinds: Sequence[str]) -> None:
    """Note that the kernels passed these kinds and no others. Raises OSError if that can't be."""
    known = files.read_cache(file())
    known.setdefault(device_name(device), {})[backend] = {
        "kernels": backends.row(backend).fingerprint(),
        "kinds": list(kinds),
        "date": date.today().isoformat(),
    }
    file().parent.mkdir(parents=True, exist_ok=True)
    files.write_json(file(), known)
    proved.cache_clear()


def file() -> Path:
    return files.cache_folder() / "proofs.json"


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


# --- the proof ------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    passed: bool
    text: str  # how many cases there were, and what went wrong


def prove(device: torch.device, names: Sequence[str]) -> bool:
    """Check the backends in turn until one has passed all, printing how it goes; whether one has.

    What each passed is kept.
    """
    print(device_name(device))
    for row in map(backends.row, names):
        if (reason := row.unusable()) is not None:
            print(f"{row.name:<8}not usable: {reason}")
            continue
        passed = [kind for kind in KIND_OF.values() if check(row, device, kind)]
        keep(row.name, device, passed)
        if len(passed) == len(KIND_OF):
            print(f"{row.name}'s kernels are now chosen by themselves on this GPU ({file()})")
            return True
    return False


def check(row: Backend, device: torch.device, kind: str) -> bool:
    begin, label = time.perf_counter(), f"{row.name:<8}{kind:<22}"
    print(label, end="", flush=True)
    verdict = watch(command(row.name, device, kind), PATIENCE)
    print(f"{verdict.text}  ({time.perf_counter() - begin:.0f} s)", flush=True)
    return verdict.passed


def command(backend: str, device: torch.device, kind: str) -> list[str]:
    where = ["--backend", backend, "--device", str(device)]
    return [sys.executable, "-m", f"{__package__}.check", *where, kind]


def watch(command: Sequence[str], patience: float) -> Verdict:
    """Runs fastattn.check, and kills it when a case takes longer than `patience` seconds."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    case, done, failures, rest = "its start", "", [], deque[str](maxlen=8)
    stuck = threading.Event()

    def stop() -> None:
        stuck.set()
        process.kill()

    assert process.stdout is not None
    while True:
        timer = threading.Timer(patience, stop)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            break
        label, _, text = line.rstrip().partition(" ")
        if label == "case":
            case = text
        elif label == "FAILED":
            failures.append(f"{case}: {text}")
        elif label == "done":
            done = text
        else:
            rest.append(line.rstrip())
    status = process.wait()
    if not done:
        end = f"took over {patience:g} s" if stuck.is_set() else f"exit status {status}"
        done = f"stopped in {case}: {end}"
        failures += rest
    return Verdict(status == 0, "\n  ".join([done, *failures[:20]]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastattn check", description=__doc__)
    parser.add_argument(
        "--backend", action="append", choices=ON_GPUS, help="default: the first that passes all"
    )
    parser.add_argument("--device", type=torch.device, default="cuda:0", help="default: cuda:0")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU here; the kernels of the CPU need no such proof")
    return 0 if prove(arguments.device, arguments.backend or ON_GPUS) else 1
