"""What `make gpu` has found so far, on disk after every step, so that a cut loses one step."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "fastattn", "kernels", "tests", "benchmarks")


class Outcome(NamedTuple):
    """Of a step. `skipped` says why in its text; `cut` ran out of time."""

    state: str  # passed, failed, skipped, cut
    text: str = ""  # one line; for a failure all one needs to know
    detail: dict[str, Any] = {}  # for the JSON  # noqa: RUF012


class Step(NamedTuple):
    name: str
    run: Callable[[float], Outcome]  # raises TimeoutExpired if it takes longer than so many seconds
    limit: float = 300.0  # seconds; a kernel that hangs must not take all there are
    always: bool = False  # also where it passed before: this machine may be another


class Journal:
    """A JSON file of one device, one state of the sources, and the outcome of each step there."""

    def __init__(self, file: Path, machine: dict[str, Any]) -> None:
        self.file = file
        self.machine = machine
        self.parts: dict[str, dict[str, dict[str, Any]]] = {}
        if file.exists():
            known = json.loads(file.read_text())
            if known["machine"]["sources"] == machine["sources"]:
                self.parts = known["parts"]

    def has_passed(self, part: str, step: str) -> bool:
        return self.parts.get(part, {}).get(step, {}).get("state") == "passed"

    def record(self, part: str, step: str, outcome: Outcome, seconds: float) -> None:
        entry = {"state": outcome.state, "seconds": round(seconds, 1), "text": outcome.text}
        entry["finished"] = datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        )
        self.parts.setdefault(part, {})[step] = entry | outcome.detail
        self.file.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": self.machine, "parts": self.parts}
        unfinished = self.file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        unfinished.replace(self.file)

    def of_state(self, state: str) -> list[tuple[str, dict[str, Any]]]:
        return [
            (f"{part}/{step}", entry)
            for part, steps in self.parts.items()
            for step, entry in steps.items()
            if entry["state"] == state
        ]


def run_part(
    part: str, steps: list[Step], journal: Journal, deadline: float, again: bool = False
) -> None:
    """Does the steps that haven't passed yet (all of them `again`), in time for `deadline`."""
    for step in steps:
        label = f"  {part}/{step.name:<{34 - len(part)}}"
        if journal.has_passed(part, step.name) and not (again or step.always):
            print(f"{label}passed before", flush=True)
            continue
        start = time.monotonic()
        outcome = _outcome_of(step, deadline - start)
        seconds = time.monotonic() - start
        journal.record(part, step.name, outcome, seconds)
        first = [*outcome.text.strip().splitlines(), ""][0]
        print(f"{label}{outcome.state:<8}{seconds:6.1f} s  {first[:100]}", flush=True)


def _outcome_of(step: Step, left: float) -> Outcome:
    if left < 5:
        return Outcome("cut", "no time was left: run it again to go on")
    try:
        return step.run(min(left, step.limit))
    except subprocess.TimeoutExpired as expired:
        text = f"not done after {expired.timeout:.0f} s\n{_tail(expired.output)}"
        return Outcome("failed" if left > step.limit else "cut", text)
    except Exception as error:  # whatever went wrong is what the run is to tell
        output = getattr(error, "output", None)
        return Outcome("failed", f"{type(error).__name__}: {error}\n{_tail(output)}")


def _tail(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text[-3000:]


def summary(journal: Journal) -> str:
    """Failures first."""
    lines = []
    for state in ("failed", "cut", "skipped"):
        for name, entry in journal.of_state(state):
            lines.append(f"{state.upper()} {name}: {entry['text'].strip()}")
    counts = {s: len(journal.of_state(s)) for s in ("passed", "failed", "cut", "skipped")}
    lines.append(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    return "\n".join(lines)


# --- the machine ----------------------------------------------------------------------------------


def sources_hash() -> str:
    """Of all that results depend on: what stands for a commit where there is no git."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(device: str, arch: int, nvcc: str | None) -> dict[str, Any]:
    """Everything a reader needs to judge the results."""
    release = re.search(r"V([\d.]+)", output_of(nvcc, "--version") or "") if nvcc else None
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    return {
        "date": now(),
        "device": device,
        "arch": arch,
        "driver, power limit, clocks": output_of(
            "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"
        ),
        "commit": output_of("git", "rev-parse", "--short", "HEAD")
        or os.environ.get("FASTATTN_COMMIT"),
        "changed": bool(output_of("git", "status", "--porcelain")),
        "sources": sources_hash(),
        "nvcc": release[1] if release else None,
        **{name: version_of(name) for name in ("torch", "triton", "pytest", "ninja")},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores",
    }


def file_name_of(device: str) -> str:
    """A folder for a device's results: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
