"""The CUDA kernels' row in the backend table, here where they run in the emulator.

They are held to the contract by the tests of every backend: test_attention.py, test_decode.py,
test_losses.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn import backend_cuda, backends, info, library
from fastattn.problem import AttentionProblem


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
    monkeypatch.setattr(library, "cuda_architectures", lambda: (75,))
    assert "built for sm_75, not for sm_80" in backend_cuda._no_image.__wrapped__(80)


def test_hopper_is_served_by_a_library_without_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTATTN_EMULATE", raising=False)
    monkeypatch.setattr(backend_cuda, "arch", lambda t: 90)
    for built, kernels in (
        ((80,), "sm_80, as the library isn't built for sm_90"),
        ((80, 90), "TMA"),
    ):
        monkeypatch.setattr(library, "cuda_architectures", lambda built=built: built)
        assert backend_cuda._no_image.__wrapped__(90) is None
        assert kernels in str(backend_cuda.remark(problem()))


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
