"""The Triton kernels' row in the backend table, here where Triton's interpreter runs them.

They are held to the contract by the tests of every backend: test_attention.py, test_decode.py,
test_losses.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn import backend_triton, backends, info
from fastattn.problem import AttentionProblem

if (reason := backend_triton.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)
if not backend_triton.interpreted():
    pytest.skip("these tests are of the interpreter", allow_module_level=True)


def problem(dtype: torch.dtype = torch.float16, **options: Any) -> AttentionProblem:
    q = torch.randn(1, 3, 2, 8).to(dtype)
    return AttentionProblem(q, q, q, **options)


def verdict(p: AttentionProblem, backend: str | None = "triton") -> str:
    return dict(backends.explain_problem(p, backend).rows)["triton"]


def test_the_interpreter_is_never_the_automatic_choice() -> None:
    p = problem()
    assert backends.choose(p, None).name != "triton"
    assert verdict(p, None) == "no: here it runs in Triton's interpreter, only if asked for by name"
    assert verdict(p) == "chosen (asked for)"
    assert backends.choose(p, "triton").name == "triton"


def test_the_environment_can_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    p = problem()
    torch.testing.assert_close(
        fastattn.attention(p.q, p.k, p.v),
        fastattn.attention(p.q, p.k, p.v, backend="reference"),
    )


def test_what_has_no_kernel_is_refused_with_the_reason() -> None:
    assert "float64 has no kernel" in verdict(problem(torch.float64))
    q = torch.empty(1, 3, 2, 8, device="meta")
    assert "the tensors are on meta" in verdict(AttentionProblem(q, q, q))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert verdict(problem()) == "no: there is no GPU"


def test_a_gpu_must_be_asked_for_and_have_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        dtype, device = torch.float16, torch.device("cuda")

    p: Any = (Elsewhere(),)
    monkeypatch.setattr(backend_triton, "interpreted", lambda: False)
    monkeypatch.setattr(backend_triton.proof, "missing", lambda backend, p: "not proved")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, served in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        backend_triton._unfit.cache_clear()
        unasked = str(backend_triton.refuses(p, asked=False))
        assert ("not proved" in unasked) == served
        assert (backend_triton.refuses(p, asked=True) is None) == served
    assert "no tensor core products for sm_75" in str(backend_triton.refuses(p, asked=True))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    backend_triton._unfit.cache_clear()
    assert "not been tried on AMD's" in str(backend_triton.refuses(p, asked=True))
    backend_triton._unfit.cache_clear()


def test_without_triton_all_else_works(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, fastattn
q = torch.ones(1, 3, 2, 4)
print(fastattn.attention(q, q, q, backend="reference").shape)
print(fastattn.explain(q, q, q))
"""
    path = str(Path(fastattn.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    shape, *rows = done.stdout.splitlines()
    assert shape == "torch.Size([1, 3, 2, 4])"
    assert rows[1].startswith("triton     no: triton can't be used: ")


def test_info_tells_of_the_interpreter() -> None:
    rows = info.backends()
    at = rows.index(("triton", "usable · Triton kernels"))
    assert rows[at + 1][1].endswith("in its interpreter; only if asked for")
