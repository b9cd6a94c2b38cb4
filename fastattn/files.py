"""Files that survive a crash, their hashes, and the data files bundled with the package.

A file counts as written once its bytes *and* its name are on disk: hence fsync on the file before
the rename, and on the folder after it. A reader then sees the old file or the new, never a part.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

# Bundled name -> sha256 of the unpacked content; data/README.md has their origin and licence.
BUNDLED_SHA256 = {
    "shakespeare.txt": "38069d76214e2d200f2731120ab0b0eb9c7a6f7f77e4bbd868ea6fcbc9e5f6bc",
    "gpt2_bpe.hex": "b580654d2e5d585af6dcee97b9cdd3a14a00503812dd6b9d4ea23a20da8bf49f",
}


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Put a folder's entries (names created, renamed, removed) on disk."""
    if os.name == "nt":  # Windows neither needs nor offers it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A writable binary file that becomes `path`, whole and on disk, if the block ends well."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as readable JSON, atomically. Floats keep every bit, NaN and infinities too."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read what write_json wrote; a ValueError names the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not valid JSON: {error}") from None


def safetensors_package() -> Any:
    """The package safetensors. Raises ImportError that says how to install it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("weights need safetensors: pip install 'fastattn[train]'") from None
    return safetensors


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file and put it on disk. OSError where it can't be, as on a full disk."""
    safetensors = safetensors_package()
    path.touch()
    mode = path.stat().st_mode  # safetensors makes another file, which only its owner may read
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} can't be written: {error}") from None
    path.chmod(mode)
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where what was found out about this machine is kept."""
    return Path(os.environ.get("FASTATTN_CACHE") or Path.home() / ".cache" / "fastattn")


def read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a file there; none where there is no such file, or one that can't be read."""
    with suppress(OSError, ValueError):
        content = read_json(path)
        if isinstance(content, dict):
            return {key: table for key, table in content.items() if isinstance(table, dict)}
    return {}


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal sha256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_bundled(name: str) -> bytes:
    """The unpacked content of a bundled file, checked against its sha256.

    Found in the installed package `fastattn.bundled`, or in data/ of a source tree that is not
    installed. Raises FileNotFoundError if the file is absent and ValueError if it is damaged.
    """
    try:
        folder = resources.files("fastattn.bundled")
    except ModuleNotFoundError:
        folder = Path(__file__).resolve().parent.parent / "data"
    content = lzma.decompress((folder / f"{name}.xz").read_bytes())
    found, expected = hashlib.sha256(content).hexdigest(), BUNDLED_SHA256[name]
    if found != expected:
        raise ValueError(f"bundled file {name} is damaged: sha256 {found}, not {expected}")
    return content
