"""What users get by installing and importing the package."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn
from fastattn import library

ROOT = Path(fastattn.__file__).parent
REPOSITORY = Path(__file__).parent.parent


def run(code: str, cwd: Path, *path: Path) -> str:
    """What Python code prints in a new process that has `path` first on its path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- import ---------------------------------------------------------------------------------------


def test_public_names() -> None:
    assert set(fastattn.__all__) <= set(dir(fastattn))
    for name in fastattn.__all__:
        assert getattr(fastattn, name).__doc__, f"{name} has no docstring"
    assert (ROOT / "py.typed").exists()


def test_version_is_the_one_in_pyproject() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert f'version = "{fastattn.__version__}"' in text


def test_import_is_quick_and_loads_nothing_it_does_not_need(tmp_path: Path) -> None:
    """Under 0.3 s of processor time on top of torch; the best of three: machines are busy."""
    code = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import fastattn
print(time.process_time() - start, *(set(sys.modules) - before))
"""
    seconds = []
    for _ in range(3):
        took, *modules = run(code, tmp_path, ROOT.parent).split()
        seconds.append(float(took))
        if seconds[-1] < 0.3:
            break
    assert min(seconds) < 0.3
    roots = {name.split(".")[0] for name in modules}
    unwanted = {"matplotlib", "tyro", "rich", "transformers", "triton", "safetensors", "tiktoken"}
    assert not roots & (unwanted | {"tensorboard", "scipy", "pandas"})
    assert not {"fastattn.gpt", "fastattn.backend_cpu", "fastattn.kernels"} & set(modules)


def test_building_without_a_compiler_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    environment = os.environ | {"CXX": "no-compiler -O2"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "found no no-compiler -O2: install g++" in done.stderr


# --- the kernels folder ---------------------------------------------------------------------------


def test_kernels_install_as_fastattn_kernels() -> None:
    kernels = importlib.import_module("fastattn.kernels")
    assert kernels.__name__ == "fastattn.kernels"
    assert Path(kernels.__file__).parent.name == "kernels"


def test_kernels_from_the_repository_root_pass_for_absent() -> None:
    """`import kernels` there means a package of another name, which is not installed."""
    code = """
import importlib.util
try:
    import kernels
    print("file", kernels.__file__)
except ImportError:
    print("file None")
"""
    isolated = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]\n" + code
    assert run(isolated, REPOSITORY, REPOSITORY) == "file None"


def test_kernels_hand_over_to_the_installed_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("answer = 42\n")
    (tmp_path / "kernels" / "part.py").write_text("from . import answer\n")
    code = "import kernels, kernels.part; print(kernels.answer, kernels.part.answer)"
    assert run(code, REPOSITORY, REPOSITORY, tmp_path) == "42 42"


# --- the compiled libraries -----------------------------------------------------------------------


def libraries() -> list[Path]:
    """_C, and _cuda where it was built."""
    return [*ROOT.glob("_C*.so"), *ROOT.glob("_cuda*.so")]


def nm(file: Path, which: str) -> list[str]:
    command = ["nm", "-DC", which, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(library.load_error() is not None, reason="the kernels are not built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_library_needs_only_the_stable_abi() -> None:
    """No symbol of ATen, c10 or CPython: one file serves torch 2.11 and later on every Python."""
    files = libraries()
    assert files[0].name == "_C.abi3.so"
    for file in files:
        symbols = [line.split(maxsplit=1)[1] for line in nm(file, "--undefined-only")]
        assert any(s.startswith("aoti_torch_") for s in symbols)
        foreign = ("at::", "c10::", "torch::", "Py", "_Py", "cuda")
        assert [s for s in symbols if s.startswith(foreign) or "at::Tensor" in s] == []


@pytest.mark.skipif(library.load_error() is not None, reason="the kernels are not built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_library_gives_away_no_names() -> None:
    """Nothing it defines could stand in for another library's symbol of the same name."""
    for file in libraries():
        names = [line.split(maxsplit=2)[2] for line in nm(file, "--defined-only")]
        assert [n for n in names if "fastattn" in n or n.startswith("cuda")] == []
