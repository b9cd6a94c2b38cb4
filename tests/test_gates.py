"""The gates over what nvcc makes of the kernels, on a few of them; `make gates` takes them all."""

from __future__ import annotations

from pathlib import Path

import gates
import pytest

HERE = gates.nvcc.HERE
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z19cache_append_kernelv' for 'sm_80'
ptxas info    : Function properties for _Z19cache_append_kernelv
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, 8 bytes smem, 352 bytes cmem[0]
"""


def kernel_of(tmp_path: Path, **numbers: int) -> gates.Kernel:
    log = tmp_path / "kernel.o.log"
    log.write_text(LOG.format(**({"stack": 0, "stores": 0, "loads": 0, "registers": 40} | numbers)))
    (kernel,) = gates.kernels_of(log)
    return kernel


def code_of(**counts: int) -> list[gates.Instruction]:
    """So many instructions of each opcode."""
    return [gates.Instruction(0, op, "") for op, count in counts.items() for _ in range(count)]


def test_ptxas_reports_are_read(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path, stack=16, stores=4, loads=12)
    assert kernel[1:] == ("sm_80", 40, 8, 16, 16)
    assert gates.readable([kernel.symbol])[kernel.symbol] == "cache_append_kernel"


def test_what_is_over_budget_fails(tmp_path: Path) -> None:
    lean = kernel_of(tmp_path)._replace(shared=0)

    def faults(kernel: gates.Kernel, name: str = "cache_append_kernel<fp16>", **ops: int) -> str:
        return "; ".join(gates.faults(kernel, name, code_of(FFMA=3, **ops)))

    assert faults(lean) == ""
    assert "8 bytes spilled" in faults(lean._replace(spills=8, stack=8))
    assert "65 registers" in faults(lean._replace(registers=65))
    assert "shared memory" in faults(lean._replace(shared=8))
    assert "local memory" in faults(lean, LDL=1)
    assert "no row in the budget" in faults(lean, "a_new_kernel")


def test_spills_are_excused_by_name_and_within_bounds(tmp_path: Path) -> None:
    ops = code_of(HMMA=8, LDL=2, **{"STG.E.128": 1})
    name = "attn_fwd_kernel<Sm75, fp16, 256, 0>"
    spilling = kernel_of(tmp_path)._replace(shared=0, spills=200, stack=100)
    assert gates.faults(spilling, name, ops) == []
    assert gates.faults(spilling, name.replace("256", "128"), ops)
    assert gates.faults(spilling._replace(spills=1000), name, ops)
    assert gates.faults(spilling, name, code_of(FFMA=1))
    narrow = code_of(HMMA=8, LDL=2, STG=4)
    assert gates.faults(spilling, name, narrow) == ["no stores of 16 bytes"]


@pytest.mark.parametrize(
    ("registers", "taken", "hangs"), [(168, 240, False), (160, 240, True), (128, 160, False)]
)
def test_warpgroups_start_with_what_they_take(registers: int, taken: int, hangs: bool) -> None:
    """As the one who asked NVIDIA/cutlass#2007 found on an H800."""
    given = 24 if taken == 240 else 32
    code = [
        gates.Instruction(0, "USETMAXREG.DEALLOC.CTAPOOL", f"{given:#x}"),
        gates.Instruction(16, "USETMAXREG.TRY_ALLOC.CTAPOOL", f"UP0, {taken:#x}"),
    ]
    assert bool(gates.pool_faults(registers, code)) is hangs
    assert gates.pool_faults(registers, code[:1])


def test_complaints_of_ptxas_are_found(tmp_path: Path) -> None:
    log = tmp_path / "kernel.o.log"
    log.write_text("ptxas info : (C7510) Potential Performance Loss: wgmma is serialised\n")
    assert gates.complaints(log) and not gates.complaints(Path(gates.__file__))


@pytest.mark.skipif(gates.nvcc.find() is None, reason="there is no nvcc")
def test_a_few_kernels_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", "80")
    files = [HERE / f"{name}.cu" for name in ("attn_decode_sm80", "cache_append", "cross_entropy")]
    count, failed = gates.check(gates.nvcc.build(None, files=files, folder=tmp_path))
    assert failed == 0, capfd.readouterr().out
    assert count >= 10
