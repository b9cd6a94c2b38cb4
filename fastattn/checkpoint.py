"""Checkpoints: folders that are whole or not there, and give every bit back.

    run_dir/step-00001000/
        model.safetensors   the model's state_dict, readable by any safetensors reader
        state.safetensors   all other tensors: the optimizer's, and the random generators'
        state.json          the rest, with a {"$tensor": name} where each of those belongs
        manifest.json       step, and size and sha256 of the files above

`save` writes into a folder with a temporary name, puts every file on disk, the manifest last, and
then renames the folder. So whenever the process or the machine stops, `latest` finds the newest
checkpoint whose manifest holds:

    save(run_dir, step, model, optimizer, {"sampler": sampler.state_dict()}, keep_last=3)
    checkpoint = load(latest(run_dir))
    checkpoint.restore(model, optimizer)  # and the random generators
    sampler.load_state_dict(checkpoint.state["sampler"])

One process writes to a run_dir at a time.
"""

from __future__ import annotations

import copy
import os
import platform
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .files import (
    fsync_folder,
    read_json,
    safetensors_package,
    sha256_of,
    write_json,
    write_tensors,
)

MANIFEST = "manifest.json"
FORMAT = 1
# A checkpoint's name; ".old-" is one set aside while another of its name takes its place.
NAME = re.compile(r"(?P<old>\.old-)?step-(?P<step>\d{8,})")
# Left behind by a process that was stopped, to be deleted: half written, half deleted.
LEFTOVER = re.compile(r"\.(tmp|del)-step-\d{8,}")

StateDict = dict[str, Any]


@dataclass
class Checkpoint:
    """What `load` read: state dicts, the random generators, and the `state` given to `save`."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: StateDict
    rng: StateDict
    state: Any
    versions: dict[str, str]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load weights, optimizer and random generators, these last: nothing may draw before them.

        Raises ValueError if the model or optimizer has other tensors than those saved.
        """
        try:
            model.load_state_dict(self.model)
            if optimizer is not None:  # which keeps the tensors it is given, and changes them
                optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path} does not fit: {error}") from None
        set_rng_state(self.rng)


# ---- save --------------------------------------------------------------------------------------


def save(
    run_dir: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Any = None,
    *,
    keep_last: int | None = None,
) -> Path:
    """Write run_dir/step-<step> (run_dir is made if absent) and return its path.

    state       anything made of dicts, lists, tuples, tensors, numbers, strings, booleans and None,
                for example config and data position
    keep_last   then delete all but this many of the newest checkpoints; None keeps all

    A checkpoint of the same name is replaced. The state of Python's, NumPy's and torch's global
    random generators is saved too. Raises TypeError for a state of other types, before writing.
    """
    tree = {
        "optimizer": optimizer.state_dict(),
        "rng": rng_state(),
        "state": state,
        "versions": _versions(),
    }
    tensors: dict[str, Tensor] = {}
    packed = _pack(tree, "", tensors)
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")

    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(run_dir)
    name = f"step-{step:08d}"
    temporary, final, old = (run_dir / f"{prefix}{name}" for prefix in (".tmp-", "", ".old-"))

    temporary.mkdir()
    try:
        write_tensors(temporary / "model.safetensors", _separate(model.state_dict()))
        write_tensors(temporary / "state.safetensors", _separate(tensors))
        write_json(temporary / "state.json", packed)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(temporary.iterdir())
        }
        write_json(temporary / MANIFEST, {"format": FORMAT, "step": step, "files": files})
    except Exception:  # a full disk, say: give the space back
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(temporary)
    if problem_with(final, hashes=False) is None:
        os.rename(final, old)  # until the other rename is done, `latest` finds `old`
    else:
        _delete(final)  # damaged, if there at all
    os.rename(temporary, final)
    fsync_folder(run_dir)
    _delete(old)
    if keep_last is not None:
        prune(run_dir, keep_last)
    return final


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, and none a view of another."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor  # tied
        seen.add(storage)
    return separate


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # from a subclass of str
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


# ---- find --------------------------------------------------------------------------------------


def problem_with(path: str | os.PathLike[str], *, hashes: bool = True) -> str | None:
    """Why the folder is not a whole checkpoint, or None if it is.

    Compares the files with the manifest: that they are there, their sizes, and their sha256 (which
    reads them) unless `hashes` is False.
    """
    path = Path(path)
    try:
        manifest = read_json(path / MANIFEST)
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']!r} is unknown; this version reads {FORMAT}"
        match = NAME.fullmatch(path.name)
        if match and int(match["step"]) != manifest["step"]:
            return f"{MANIFEST} is of step {manifest['step']}"
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, not {expected['bytes']}"
            if hashes and sha256_of(path / name) != expected["sha256"]:
                return f"{name} has another sha256 than when it was written"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    return None


def _candidates(run_dir: Path) -> list[Path]:
    """Folders with a checkpoint's name, newest step first, and ".old-" after its namesake."""
    found = []
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match["step"]), not match["old"], path))
    return [path for *_, path in sorted(found, reverse=True)]


def latest(run_dir: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint in `run_dir`, or None if there is no checkpoint at all.

    Damaged ones bring a warning; ValueError if all are.
    """
    damaged: list[str] = []
    for path in _candidates(Path(run_dir)):
        problem = problem_with(path)
        if problem is None:
            for text in damaged:
                warnings.warn(f"skipping damaged checkpoint {text}", stacklevel=2)
            return path
        damaged.append(f"{path}: {problem}")
    if damaged:
        raise ValueError("no checkpoint is whole: " + "; ".join(damaged))
    return None


def prune(run_dir: str | os.PathLike[str], keep_last: int) -> None:
    """Delete whole checkpoints but the newest `keep_last`. Damaged ones neither count nor go."""
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    whole = [path for path in _candidates(Path(run_dir)) if not problem_with(path, hashes=False)]
    for path in whole[keep_last:]:
        _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint by way of another name, so that a half-deleted one is not found."""
    if path.exists():
        doomed = path.with_name(".del-" + path.name.removeprefix(".old-"))
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _delete_leftovers(run_dir: Path) -> None:
    """Remove what stopped processes left behind that is not needed."""
    for path in run_dir.iterdir():
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)
        elif path.name.startswith(".old-"):
            successor = path.with_name(path.name.removeprefix(".old-"))
            if problem_with(successor, hashes=False) is None:
                _delete(path)


# ---- load --------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint folder, to the CPU.

    Raises FileNotFoundError if there is none, and ValueError, with the reason, if it is damaged
    (`verify` compares every byte's hash).
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint {path}")
    problem = problem_with(path, hashes=verify)
    if problem is not None:
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    load_file = safetensors_package().torch.load_file
    tree = _unpack(read_json(path / "state.json"), load_file(path / "state.safetensors"))
    return Checkpoint(
        path=path,
        step=read_json(path / MANIFEST)["step"],
        model=load_file(path / "model.safetensors"),
        **tree,
    )


# ---- a tree of values <-> JSON and tensors -----------------------------------------------------


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved into `tensors` under their path; see _unpack."""
    if isinstance(value, Tensor):
        while path in tensors:  # keys 1 and "1", or "a.b" and "a" with "b" in it
            path += "'"
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, Mapping):
        items = {
            key: _pack(item, f"{path}.{key}".lstrip("."), tensors) for key, item in value.items()
        }
        if all(isinstance(key, str) and not key.startswith("$") for key in items):
            return items
        return {"$dict": [[_pack(key, path, tensors), item] for key, item in items.items()]}
    if isinstance(value, list | tuple):
        packed = [_pack(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return packed if isinstance(value, list) else {"$tuple": packed}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__} (at {path})")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of _pack: equal values of equal types, tensors bit for bit."""
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unpack(value["$tuple"], tensors))
    if "$dict" in value:
        return {_unpack(k, tensors): _unpack(item, tensors) for k, item in value["$dict"]}
    return {key: _unpack(item, tensors) for key, item in value.items()}


# ---- random generators -------------------------------------------------------------------------


def rng_state() -> StateDict:
    """The state of the global generators of Python, NumPy and torch (CPU and each CUDA device)."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (a user's code may draw from it)
    kind, keys, *rest = numpy_state
    return {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),  # uint8
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: StateDict) -> None:
    """Put the generators back; CUDA's if this machine has as many devices as the state."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
