"""Tiles by trial: with FASTATTN_TRITON_AUTOTUNE=on the table's and a few like it are timed.

It is off by default: the tile decides in which order sums are rounded, so that two processes get
the same bits only where nothing is timed. A kernel is tuned once for each of its specialisations,
and apart for grids that do not fill the GPU. Each trial is compiled, for seconds, and then takes
BUDGET_MS on the GPU. What wins is kept on disk, in FASTATTN_CACHE or ~/.cache/fastattn, by device
and by what the kernel is compiled from.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from fastattn import files

from . import configs
from .configs import Tile

SWITCH = "FASTATTN_TRITON_AUTOTUNE"
BUDGET_MS = 20
_here: dict[tuple[Path, str, str], Tile] = {}  # tuned by this process, should the disk be full


def on() -> bool:
    setting = os.environ.get(SWITCH) or "off"
    if setting not in ("on", "off"):
        raise ValueError(f"{SWITCH} must be on or off, got {setting!r}")
    return setting == "on"


def best(launch: Any, plan: Callable[[Tile], Any]) -> tuple[Tile, bool]:
    """(tile, whether that is final): what is known for `launch`, else the fastest of `plan`'s.
    While a CUDA graph is captured nothing is tried, and the launch's own tile is not final."""
    path, kernel, problem = path_for(device_name()), kernel_key(launch), class_of(launch)
    known = _tile(files.read_cache(path).get(kernel, {}).get(problem))
    if known is None:
        known = _here.get((path, kernel, problem))
    if known is not None:
        return known, True
    if capturing():
        return launch.tile, False
    tile = min(candidates(launch.tile), key=lambda tile: _time(plan(tile)))
    _here[path, kernel, problem] = tile
    _keep(path, kernel, problem, tile)
    return tile, True


def candidates(tile: Tile) -> Iterator[Tile]:
    """The tile, then those that differ in one thing: a stage, passing rows, rows kept, warps."""
    yield tile
    yield tile._replace(stages=tile.stages + 1)
    if tile.stages > 1:
        yield tile._replace(stages=tile.stages - 1)
    yield tile._replace(block_n=2 * tile.block_n)
    if tile.block_n > 16:
        yield tile._replace(block_n=tile.block_n // 2)
    if tile.block_m > 16:
        yield tile._replace(block_m=tile.block_m // 2, warps=max(tile.warps // 2, 4))
    yield tile._replace(warps=12 - tile.warps if tile.warps in (4, 8) else 4)


# --- time -----------------------------------------------------------------------------------------


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _time(launch: Any) -> float:
    try:
        return milliseconds(launch)
    except (TritonError, RuntimeError):  # too much shared memory, or a pass of the compiler failed
        return float("inf")


def milliseconds(launch: Any) -> float:
    """The median, of a cold L2."""
    return triton.testing.do_bench(launch.run, warmup=5, rep=BUDGET_MS, return_mode="median")


# --- what is known --------------------------------------------------------------------------------


def device_name() -> str:
    return torch.cuda.get_device_name()


def path_for(device: str) -> Path:
    return files.cache_folder() / f"triton-tiles-{re.sub('[^a-zA-Z0-9]+', '-', device)}.json"


def kernel_key(launch: Any) -> str:
    """Changes with the kernel's source and with the compiler."""
    return f"{launch.kernel.__name__} triton {triton.__version__} {source_of(launch)}"


def source_of(launch: Any) -> str:
    """A hash of the kernel's source and that of all it calls."""
    return launch.kernel.cache_key[:16]


def class_of(launch: Any) -> str:
    """What is compiled apart from the tile, and whether there is a program for every processor."""
    constants = (f"{k}={v}" for k, v in launch.constants.items() if k not in ("BLOCK_M", "BLOCK_N"))
    filled = launch.programs >= configs.multiprocessors()
    arguments = " ".join(_kinds(launch.arguments))
    return f"{' '.join(constants)} {'filled' if filled else 'unfilled'}: {arguments}"


def _kinds(arguments: tuple[Any, ...]) -> Iterator[str]:
    for x in arguments:
        if isinstance(x, tuple):
            yield f"({' '.join(_kinds(x))})"
        elif isinstance(x, Tensor):
            yield str(x.dtype).removeprefix("torch.")
        else:
            yield "-" if x is None else "n"


def _tile(numbers: Any) -> Tile | None:
    ok = isinstance(numbers, list) and len(numbers) == 4
    return Tile(*numbers) if ok and all(type(n) is int and n > 0 for n in numbers) else None


def _keep(path: Path, kernel: str, problem: str, tile: Tile) -> None:
    known = files.read_cache(path)
    known.setdefault(kernel, {})[problem] = list(tile)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, known)
    except OSError as error:
        warnings.warn(f"tuned tiles are forgotten with this process: {error}", stacklevel=2)
