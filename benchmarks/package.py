"""What the package costs: seconds to install and to import, bytes of the wheel.

Imports are timed in fresh processes, beside torch's alone, which is most of it. The installation is
`pip wheel` of a clean copy of the checkout and the installation of that wheel, once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from . import unbound
from .case import Call, Case, Inputs, Peer

ROOT = Path(__file__).resolve().parent.parent
SUITE = frozenset({"import-and-build"})


@dataclass(frozen=True, kw_only=True)
class Package(Case):
    what: Literal["import", "install"]
    dtype: torch.dtype = torch.float32  # means nothing here

    timed_only = True

    @property
    def name(self) -> str:
        return {"import": "import, fresh process", "install": "build and install"}[self.what]

    @property
    def features(self) -> frozenset[str]:
        return frozenset({self.what})

    @property
    def once(self) -> bool:  # type: ignore[override]
        return self.what == "install"

    def inputs(self, device: torch.device) -> Inputs:
        return {}

    def exact(self, inputs: Inputs) -> dict[str, Tensor]:
        return {}


def outside(command: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **unbound())
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip()[-500:])


def importing(module: str) -> Call:
    """From the checkout's root, whichever fastattn is installed."""

    def run() -> None:
        outside([sys.executable, "-c", f"import {module}"], cwd=ROOT)

    return Call(run, lambda _: {})


def copy_checkout(folder: Path) -> None:
    """What git tracks, without what was built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def installing() -> Call:
    facts: dict[str, float] = {}

    def run() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            source, wheels, target = (Path(temporary) / name for name in ("src", "whl", "lib"))
            copy_checkout(source)
            pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
            alone = ["--no-deps", "--no-build-isolation"]
            outside([*pip, "wheel", *alone, "-w", str(wheels), str(source)])
            (wheel,) = wheels.glob("*.whl")
            outside([*pip, "install", *alone, "--target", str(target), str(wheel)])
            files = [f for f in target.rglob("*") if f.is_file() and f.suffix != ".pyc"]
            facts["wheel_bytes"] = wheel.stat().st_size
            facts["installed_bytes"] = sum(f.stat().st_size for f in files)

    return Call(run, lambda _: {}, facts=facts)


def prepare(case: Case, inputs: Inputs) -> Call:
    assert isinstance(case, Package)
    return importing("fastattn") if case.what == "import" else installing()


PEERS = [
    Peer(
        name="fastattn",
        suites=SUITE,
        prepare=prepare,
        features=frozenset({"import", "install"}),
        backend="package",
    ),
    Peer(
        name="torch",
        suites=SUITE,
        prepare=lambda case, inputs: importing("torch"),
        features=frozenset({"import"}),
    ),
]
