"""The ladder: its rungs on the emulator, what nvcc makes of them, their place in the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

import emulated
import gates
import pipe_cycles
import planted
import pytest
import torch

from benchmarks import results, suites
from benchmarks.ladder import emulation, model, table
from benchmarks.ladder.rungs import HEAD_DIMS, HERE, RUNGS, Rung, compile_for_gpu

by_name = pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.stem)
needs_nvcc = pytest.mark.skipif(gates.nvcc.find() is None, reason="there is no nvcc")


@pytest.fixture(autouse=True)
def emulator() -> None:
    if (reason := emulated.why_not()) is not None:
        pytest.skip(reason)


# --- on the emulator ------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rungs_are_right_for_any_length(rung: Rung, head_dim: int) -> None:
    for seqlen, heads in ((1, 3), (64, 1), (131, 2)):
        emulation.check(emulation.run(rung, head_dim, seqlen, heads), f"{rung.stem} at S {seqlen}")


@pytest.mark.parametrize("rung", RUNGS[4:], ids=lambda rung: rung.stem)
def test_results_are_the_same_whenever_copies_and_products_end(rung: Rung) -> None:
    library, found = emulation.library(rung), []
    for options in ("lazy", "eager", "random,seed=1", "random,seed=2", "random,seed=3"):
        library.set_options(options)
        found.append(emulation.run(rung, 64, 200).ours)
    library.set_options()
    assert all(torch.equal(out, found[0]) for out in found)


@pytest.mark.parametrize("rung", RUNGS[2:], ids=lambda rung: rung.stem)
def test_every_barrier_wait_and_fence_is_needed(rung: Rung) -> None:
    """At a length where each has a task. Whose turn it is makes no difference but in time."""
    seqlen = 400 if rung.stem == "07_ping_pong" else 200
    library = emulation.library(rung)
    missed = planted.unnoticed(library, lambda: [emulation.run(rung, 64, seqlen, heads=1).ours])
    lines = rung.source.read_text().splitlines()
    turns = [f"{rung.source.name}:{n}" for n, line in enumerate(lines, 1) if "bar_sync" in line]
    assert missed == turns


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_banks_conflict_where_it_is_said(head_dim: int) -> None:
    """And the model counts the turns of shared memory as the emulator does: of 64 × 64 scores, 1024
    of each of four warps. Q's fragments, which rung 5 loads once, are not in it."""
    code = model.Compiled(registers=0, shared=0, spills=0, products=1, instructions=1)
    for rung, loads, turns, once in (
        (RUNGS[3], "load", {4, 8}, 0),
        (RUNGS[4], "ldmatrix", {4}, head_dim // 16 * 4),
    ):
        library = emulation.library(rung)
        library.set_options("banks=1,races=0")
        library.bank_conflicts()
        emulation.run(rung, head_dim, seqlen=64, heads=1)
        library.set_options()
        found = [access for access in library.bank_conflicts() if access.instruction == loads]
        assert {access.wavefronts / access.accesses for access in found} == turns
        assert any(access.conflicts for access in found) == (rung == RUNGS[3])
        cycles = model.MODELS[rung.stem](head_dim, code)["shared memory"]
        assert sum(access.wavefronts for access in found) / 4 == cycles + once


# --- what nvcc makes of them ----------------------------------------------------------------------


@needs_nvcc
@by_name
def test_rungs_compile_without_spills(rung: Rung, tmp_path: Path) -> None:
    library = compile_for_gpu(rung, 90, tmp_path)
    log = library.with_suffix(".so.log")
    assert gates.complaints(log) == []
    kernels = list(gates.kernels_of(log))
    assert len(kernels) >= len(HEAD_DIMS) and not any(k.spills or k.stack for k in kernels)
    row = next(line for line in table.README.read_text().splitlines() if rung.stem in line)
    code = model.compiled(rung, table.HEAD_DIM, 90, tmp_path)
    assert f"| {code.shared / 1024:.0f} |" in row


def test_the_hot_loop_is_that_of_the_products() -> None:
    """Not a shorter one with multiply-adds of something else, nor one around it."""
    lines = """
        /*0000*/                   FFMA R1, R2, R3, R1 ;
        /*0010*/               @P0 BRA 0x0 ;
        /*0020*/                   MOV R4, RZ ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/               @P0 BRA 0x30 ;
        /*0060*/               @P1 BRA 0x20 ;
    """
    code = [i for line in lines.splitlines() if (i := pipe_cycles.parse(line)) is not None]
    assert model.mix(code) == (1, 3)
    assert model.mix(code[:2]) == (1, 2)


def test_the_bound_is_the_slowest_unit() -> None:
    code = model.Compiled(registers=128, shared=0, spills=0, products=100, instructions=200)
    for rung in RUNGS:
        unit, flops = model.bound(rung, 128, code)
        cycles = model.MODELS[rung.stem](128, code)
        assert cycles[unit] == max(cycles.values())
        assert 0.1e12 < flops < 1000e12
    climb = [model.bound(rung, 128, code).flops for rung in RUNGS[2:]]
    assert climb == sorted(climb)


# --- in the benchmarks ----------------------------------------------------------------------------


def test_every_file_is_a_rung_and_has_a_row() -> None:
    assert sorted(file.stem for file in HERE.glob("*.cu")) == [rung.stem for rung in RUNGS]
    rows = re.findall(r"^\| \[(\w+)\]\(\1\.cu\)", table.README.read_text(), re.MULTILINE)
    assert rows == [rung.stem for rung in RUNGS]


def test_gpus_that_cannot_run_a_rung_are_told_why() -> None:
    last = RUNGS[-1]
    assert last.refuses(90) is None and last.refuses(100) == "for sm_90a"
    assert RUNGS[4].refuses(75) == "for sm_80 and later" and RUNGS[4].refuses(120) is None
    assert RUNGS[0].refuses(75) is None


def test_measured_figures_come_from_results(tmp_path: Path) -> None:
    (case,) = (
        case
        for case in suites.cases("cuda")
        if case.suite == "ladder" and "D128" in case.name and case.dtype == torch.bfloat16
    )
    (committed, *_) = results.read_all([results.RESULTS])
    document = committed[1] | {"lost": []}
    entry = {"median": 1e-3, "lower": 1e-3, "upper": 1e-3, "quiet_rounds": 5, "rounds": 5}
    result = document["results"][0] | {
        "suite": "ladder",
        "case": case.name,
        "flops": case.flops,
        "peers": {RUNGS[6].peer: {"seconds": entry, "share_of_floor": 0.5}},
    }
    document["results"] = [result]
    document["machine"] = document["machine"] | {"kind": "a-gpu"}
    results.write(tmp_path / "one.json", document)
    flops = f"{case.flops / 1e-3 / 1e12:.3g} (50%)"
    assert table.measured(tmp_path) == {"a-gpu": {"07_ping_pong": flops}}
