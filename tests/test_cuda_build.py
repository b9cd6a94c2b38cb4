"""How csrc/cuda/nvcc.py compiles: which file for which architectures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402


@pytest.mark.parametrize(
    ("name", "archs", "cubins", "ptx"),
    [
        ("loss.cu", [75, 80, 90], ["75", "80", "90"], "90"),
        ("attn_sm75.cu", [75, 80, 90], ["75"], None),
        ("attn_sm75.cu", [80], [], None),
        ("attn_sm80.cu", [75, 80, 90, 120], ["80", "90", "120"], "120"),
        ("attn_sm80.cu", [75], [], None),
        ("attn_sm90.cu", [75, 80, 90, 120], ["90a"], None),
        ("attn_sm90.cu", [80], [], None),
    ],
)
def test_a_name_says_what_a_file_is_for(
    name: str, archs: list[int], cubins: list[str], ptx: str | None
) -> None:
    expected = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in cubins]
    if ptx is not None:
        expected.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    assert nvcc.targets(Path(name), archs) == expected


@pytest.mark.skipif(nvcc.find() is None, reason="there is no nvcc")
@pytest.mark.parametrize("archs", ["75", "80"])
def test_what_is_for_other_architectures_is_not_asked_for(
    archs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Files of sm_75, sm_80 and sm_90 are left out, and the linker finds all that is called."""
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", archs)
    files = [nvcc.HERE / f"{name}.cu" for name in ("attn_fwd", "attn_bwd", "attn_fwd_sm90")]
    nvcc.build(None, files=files, folder=tmp_path)
    assert not (tmp_path / "attn_fwd_sm90.o").exists()
    command = ["nm", "-u", "-C", tmp_path / "attn_fwd.o", tmp_path / "attn_bwd.o"]
    missing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"attn_(?:fwd|bwd)_sm\d+", missing)) == {
        f"attn_fwd_sm{archs}",
        f"attn_bwd_sm{archs}",
    }


@pytest.mark.parametrize("header", sorted(nvcc.HERE.glob("*.cuh")), ids=lambda file: file.name)
def test_kernels_in_headers_are_static(header: Path) -> None:
    """csrc/cuda/launch.cuh says why."""
    assert not re.search(r"^(?!static |//).*__global__", header.read_text(), re.MULTILINE)


def test_the_longest_come_first() -> None:
    names = [file.stem for file in nvcc.sources()]
    assert names[:2] == ["attn_bwd_sm90", "attn_fwd_sm90"]
    assert sorted(names) == sorted(file.stem for file in nvcc.HERE.glob("*.cu"))


def test_architectures_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, archs in (
        ("90;75,80", [75, 80, 90]),
        ("9.0a 8.0 12.0", [80, 90, 120]),
        ("90a;100", [90, 100]),
    ):
        monkeypatch.setenv("FASTATTN_CUDA_ARCHS", text)
        assert nvcc.architectures("no nvcc is asked") == archs
    for text in ("sm_80", "80;;x", "70;80", "hopper"):
        monkeypatch.setenv("FASTATTN_CUDA_ARCHS", text)
        with pytest.raises(SystemExit, match=text):
            nvcc.architectures("no nvcc is asked")


def test_nvcc_of_cuda_home_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for name in ("home", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    assert nvcc.find() == os.path.join(tmp_path, "path", "bin", "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc.find() == os.path.join(tmp_path, "home", "bin", "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert nvcc.find() == os.path.join(tmp_path, "path", "bin", "nvcc")
    monkeypatch.setenv("PATH", "")
    assert nvcc.find() is None
