"""The backend table: who is chosen, who refuses and why, and what can be forced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import backends, library
from fastattn.problem import AttentionProblem

ROOT = Path(fastattn.__file__).parent
BUILT = library.load_error() is None


def tensors(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(1, 3, 2, 4, dtype=dtype, device=device) for _ in range(3))


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the compiled library were missing."""
    monkeypatch.setattr(library, "load_error", lambda: "there is no library")
    backends._warn_once.cache_clear()


# --- choice ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not BUILT, reason="the kernels are not built")
@pytest.mark.parametrize("dtype", backends.KERNEL_DTYPES)
def test_kernels_come_first(dtype: torch.dtype) -> None:
    p = AttentionProblem(*tensors(dtype))
    assert backends.choose(p, None).name == "cpu"
    assert backends.choose(p, "reference").name == "reference"


def test_float64_goes_to_the_reference_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(AttentionProblem(*tensors(torch.float64)), None).name == "reference"
        assert fastattn.attention(*tensors(torch.float64)).dtype == torch.float64


def test_landing_on_the_reference_warns_once(unbuilt: None) -> None:
    with pytest.warns(UserWarning, match=r"slow reference path.*cpu: there is no library"):
        fastattn.attention(*tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(*tensors())
        fastattn.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]))


def test_asking_for_the_reference_does_not_warn(unbuilt: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(*tensors(), backend="reference")


def test_everything_works_without_kernels(unbuilt: None) -> None:
    """Also what goes through operators, whose gradients the reference then computes."""
    q, k, v = (t.requires_grad_() for t in tensors())
    z = torch.randn(6, 5, requires_grad=True)
    target = torch.arange(6) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
        (out.sum() + lse.sum()).backward()
        loss = fastattn.cross_entropy(z, target)
        loss += fastattn.linear_cross_entropy(z, torch.ones(5, 5), target)
        loss += fastattn.cross_entropy(z.clone(), target, inplace=True)
        loss.backward()
        lengths = torch.ones(1, dtype=torch.int32)
        with torch.no_grad():
            fastattn.attention_decode(q, k, v, cache_seqlens=lengths)
    assert q.grad.isfinite().all() and z.grad.isfinite().all()


# --- forcing --------------------------------------------------------------------------------------


def test_what_is_asked_for_runs_or_says_why_not(unbuilt: None) -> None:
    z, target = torch.ones(2, 3), torch.tensor([0, 1])
    lengths = torch.ones(1, dtype=torch.int32)
    q, k, v = tensors()
    for call in (
        lambda: fastattn.attention(q, k, v, backend="cpu"),
        lambda: fastattn.attention_decode(q, k, v, cache_seqlens=lengths, backend="cpu"),
        lambda: fastattn.cross_entropy(z, target, backend="cpu"),
        lambda: fastattn.linear_cross_entropy(z, z, target, backend="cpu"),
    ):
        with pytest.raises(RuntimeError, match=r"backend='cpu' can't take .* there is no"):
            call()


@pytest.mark.skipif(not BUILT, reason="the kernels are not built")
def test_kernels_refuse_float64() -> None:
    q, k, v = tensors(torch.float64)
    z, target = torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    for call in (
        lambda: fastattn.attention(q, k, v, backend="cpu"),
        lambda: fastattn.cross_entropy(z, target, backend="cpu"),
        lambda: fastattn.linear_cross_entropy(z, z, target, backend="cpu"),
    ):
        with pytest.raises(RuntimeError, match="float64 has no kernel"):
            call()


def test_the_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    p = AttentionProblem(*tensors())
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert backends.choose(p, None).name == "reference"
    assert fastattn.attention(*(t.requires_grad_() for t in tensors())).grad_fn.name() != (
        "AttentionFunctionBackward"
    )
    monkeypatch.setenv("FASTATTN_BACKEND", "")
    assert backends.requested(None) is None


@pytest.mark.skipif(not BUILT, reason="the kernels are not built")
def test_an_argument_outdoes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert backends.choose(AttentionProblem(*tensors()), "cpu").name == "cpu"


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="backend='gpu' is no backend; there are cuda, triton, cpu, reference"
    ):
        fastattn.attention(*tensors(), backend="gpu")
    monkeypatch.setenv("FASTATTN_BACKEND", "quick")
    with pytest.raises(ValueError, match="FASTATTN_BACKEND='quick' is no backend"):
        fastattn.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]))


# --- explain --------------------------------------------------------------------------------------


@pytest.mark.skipif(not BUILT, reason="the kernels are not built")
def test_explain_names_the_chosen_one() -> None:
    explanation = fastattn.explain(*tensors())
    assert explanation.rows[2:] == (("cpu", "chosen"), ("reference", "could, not chosen"))
    for row, name in zip(explanation.rows, ("cuda", "triton"), strict=False):
        assert row[0] == name and row[1].startswith("no: ")
    assert str(explanation).splitlines()[2].split() == ["cpu", "chosen"]


def test_explain_says_why_not(unbuilt: None) -> None:
    rows = dict(fastattn.explain(*tensors(), dropout_p=0.1).rows)
    assert rows.pop("cuda").startswith("no: ") and rows.pop("triton").startswith("no: ")
    assert rows == {"cpu": "no: there is no library", "reference": "chosen"}
    rows = dict(fastattn.explain(*tensors(), backend="reference").rows)
    assert rows["reference"] == "chosen (asked for)"
    rows = dict(fastattn.explain(*tensors(), backend="cpu").rows)
    assert rows["reference"] == "could, not chosen"  # and nothing is chosen: attention raises


@pytest.mark.skipif(not BUILT, reason="the kernels are not built")
def test_explain_gives_dtype_and_device() -> None:
    assert "float64 has no kernel" in str(fastattn.explain(*tensors(torch.float64)))
    assert "the tensors are on meta" in str(fastattn.explain(*tensors(device="meta")))


def test_explain_checks_arguments() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        fastattn.explain(q[0], k, v)
    with pytest.raises(ValueError, match="dropout_p"):
        fastattn.explain(q, k, v, dropout_p=2)


def test_explain_sees_autocast() -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.explain(q, k.bfloat16(), v).rows


# --- fresh processes ------------------------------------------------------------------------------


def run(code: str, root: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a new process; modules come from `root` first."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


ATTEND = """
import torch, fastattn
from fastattn import library
torch.manual_seed(0)
q = torch.randn(1, 70, 2, 24)
out, lse = fastattn.attention(q, q, q, causal=True, return_lse=True, backend="cpu")
expected = fastattn.attention(q, q, q, causal=True, backend="reference")
torch.testing.assert_close(out, expected)
print(library.cpu_isa())
"""


@pytest.mark.skipif(not BUILT, reason="the kernels are not built")
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    done = run(ATTEND, FASTATTN_CPU_ISA=isa)
    if done.returncode != 0 and "can't be used here" in done.stderr and isa != "scalar":
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@pytest.mark.skipif(not BUILT, reason="the kernels are not built")
def test_a_wrong_instruction_set_raises_with_the_right_ones() -> None:
    done = run(ATTEND, FASTATTN_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "FASTATTN_CPU_ISA=sse9 can't be used here; usable: " in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("scalar")


def test_a_package_without_its_library(tmp_path: Path) -> None:
    """As installed where there is no compiler: works, slowly, and says so once."""
    copy = tmp_path / "fastattn"
    copy.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    code = """
import torch, fastattn
q = torch.ones(1, 3, 2, 4, requires_grad=True)
for _ in range(2):
    fastattn.attention(q, q, q, causal=True).sum().backward()
print(fastattn.__file__)
print(fastattn.explain(q, q, q))
try:
    fastattn.attention(q, q, q, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    where, cuda, triton, cpu, reference, error = done.stdout.splitlines()
    assert where == str(copy / "__init__.py")
    assert cuda.startswith("cuda") and "no: " in cuda
    assert triton.startswith("triton") and "no: " in triton
    assert cpu.startswith("cpu") and "fastattn/_C*.so is missing" in cpu
    assert reference.split() == ["reference", "chosen"]
    assert "backend='cpu' can't take this problem: fastattn/_C*.so is missing" in error
    assert done.stderr.count("slow reference path") == 1


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    reason = library.load_error.__wrapped__()
    assert reason is not None and reason.startswith("_C.abi3.so could not be loaded: ")
    with pytest.raises(RuntimeError, match="could not be loaded"):
        monkeypatch.setattr(library, "load_error", lambda: reason)
        library.instruction_sets.__wrapped__()


@pytest.mark.skipif(not BUILT, reason="the kernels are not built")
def test_a_library_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    file = library._find("_C*.so", "FASTATTN_LIBRARY")
    assert file is not None
    monkeypatch.setattr(library, "INTERFACE", library.INTERFACE + 1)
    reason = library._load.__wrapped__(file, "fastattn_C")
    assert reason is not None and "was built from other sources than this package's (int" in reason


def test_a_library_of_before_there_was_an_interface() -> None:
    """Any library without fastattn's operators will do."""
    stale = Path(torch.__file__).parent / "lib" / "libc10.so"
    code = "from fastattn import info; print(info.report())"
    environment = {**os.environ, "FASTATTN_LIBRARY": str(stale)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (
        "libc10.so was built from other sources than this package's: build it again" in done.stdout
    )
