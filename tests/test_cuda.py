"""The CUDA kernels on the emulator, and the backend's row: what it takes and what it refuses.

Cross-entropy and decoding are held to the contract by the tests of every backend, test_losses.py
and test_decode.py; attention here, as long as it has no backward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import public
import pytest
import torch

import fastattn
from fastattn import backend_cuda, backends, info, library, reference
from fastattn.problem import AttentionProblem
from fastattn.testing import (
    CASES,
    Case,
    assert_results_close,
    eager_attention,
    make_problem,
    to_float64,
)

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=public.name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_keeps_the_contract(
    emulated_arch: int, case: Case, dtype: torch.dtype, poisoned: None
) -> None:
    p = make_problem(case, dtype)
    if p.dropout_p > 0:
        p = p._replace(seed=public.drawn_seed())
    out, lse = public.attention(p, "cuda")
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
    results = [(out, lse), reference.attention(to_float64(p)), eager_attention(p)]
    names = ("out", "lse")
    assert_results_close(*(dict(zip(names, result, strict=True)) for result in results))


# --- the row of the backend table -----------------------------------------------------------------


def problem(dtype: torch.dtype = torch.float16, **options: Any) -> AttentionProblem:
    q = torch.randn(1, 3, 2, 8).to(dtype)
    return AttentionProblem(q, q, q, **options)


def verdict(p: AttentionProblem, backend: str | None = "cuda") -> str:
    return dict(backends.explain_problem(p, backend).rows)["cuda"]


def test_the_emulator_is_never_the_automatic_choice(emulated_arch: int) -> None:
    p = problem()
    assert backends.choose(p, None).name != "cuda"
    assert verdict(p, None) == "no: here it runs in the emulator, only if asked for by name"
    assert verdict(p) == "chosen (asked for)"
    assert backends.choose(p, "cuda").name == "cuda"


def test_the_environment_can_ask_for_it(
    emulated_arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "cuda")
    p = problem()
    torch.testing.assert_close(
        fastattn.attention(p.q, p.k, p.v),
        fastattn.attention(p.q, p.k, p.v, backend="reference"),
    )


def test_what_has_no_kernel_is_refused_with_the_reason(emulated_arch: int) -> None:
    assert "float64 has no kernel" in verdict(problem(torch.float64))
    bf16 = verdict(problem(torch.bfloat16))
    assert ("no tensor core products of bfloat16" in bf16) == (emulated_arch == 75)
    p = problem()
    with pytest.raises(RuntimeError, match="no backward kernel yet"):
        fastattn.attention(p.q.requires_grad_(), p.k, p.v, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here CUDA kernels may be usable")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_EMULATE", raising=False)
    assert verdict(problem()) in (
        "no: this torch is built without CUDA",
        "no: there is no CUDA device",
    )


def test_a_device_needs_machine_code_or_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_EMULATE", raising=False)
    monkeypatch.setattr(library, "cuda_architectures", lambda: (75, 80, 90))
    for arch, served in ((75, True), (70, False), (80, True), (86, True), (90, True), (120, True)):
        reason = backend_cuda._no_image.__wrapped__(arch)
        assert (reason is None) == served, arch
    assert reason is None
    assert "built for sm_75, sm_80, sm_90, not for sm_70" in backend_cuda._no_image.__wrapped__(70)


def test_a_missing_library_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTATTN_EMULATE", str(tmp_path / "absent.so"))
    assert "absent.so could not be loaded" in verdict(problem())
    monkeypatch.delenv("FASTATTN_EMULATE")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv("FASTATTN_CUDA_LIBRARY", raising=False)
    assert "fastattn/_cuda*.so is missing" in str(library.cuda_load_error())


def test_info_tells_of_the_emulator(emulated_arch: int) -> None:
    rows = info.backends()
    assert rows[0] == ("cuda", "usable · CUDA C++ kernels")
    assert f"as on sm_{emulated_arch}; only if asked for" in rows[1][1]


def test_kernels_only_touch_what_they_are_given(emulated_arch: int) -> None:
    """The emulator knows the extents of an operator's arguments: here of an output too short."""
    p = problem()
    out, lse = torch.empty_like(p.q), torch.empty(1, 2, 3)
    assert library.cuda_load_error() is None
    op = torch.ops.fastattn_emulated.attn_fwd
    op(*p, out, lse)
    with pytest.raises(RuntimeError, match=r"store .* outside all buffers.*tensor argument 17"):
        op(*p, out[:, :2], lse)
