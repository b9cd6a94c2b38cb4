"""The process that holds a backend to float64, and what it says of it."""

import pytest
import torch

from fastattn import backend_cpu, check, library, proof, reference

needs_kernels = pytest.mark.skipif(library.load_error() is not None, reason="no compiled kernels")
ON_CPU = ["--backend", "cpu", "--device", "cpu"]


@pytest.fixture(autouse=True)
def default_device():
    yield
    torch.set_default_device(None)


def test_every_kind_of_problem_is_checked():
    assert list(check.KINDS) == list(proof.KIND_OF.values())


@needs_kernels
def test_it_counts_and_ends_well(capsys):
    assert check.main([*ON_CPU, "--names", "causal", "mqa", "plain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "case attention causal float32" in lines
    assert "case entropy causal float16" in lines
    assert "case decode mqa float16" in lines
    assert "case linear_cross_entropy plain bfloat16" in lines
    assert lines[-1] == "done 18 cases, 0 failed"


@needs_kernels
def test_a_wrong_result_fails_and_the_others_still_run(capsys, monkeypatch):
    right = reference.attention
    kind = check.KINDS["attention"]._replace(function=lambda p, backend: wrong_for_bf16(right(p)))
    monkeypatch.setitem(check.KINDS, "attention", kind)
    assert check.main([*ON_CPU, "attention", "--names", "causal"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (failed,) = (line for line in lines if line.startswith("FAILED"))
    assert "out: max error" in failed and lines.index(failed) == 2  # after float32 and bfloat16
    assert lines[-1] == "done 6 cases, 1 failed"


def wrong_for_bf16(results):
    out, lse = results
    return (out * 1.5 if out.dtype == torch.bfloat16 else out), lse


@needs_kernels
def test_a_wrong_entropy_leaves_attention_unproved(capsys, monkeypatch):
    right = backend_cpu.attn_entropy
    monkeypatch.setattr(backend_cpu, "attn_entropy", lambda p, lse: right(p, lse) * 1.001)
    assert check.main([*ON_CPU, "attention", "--names", "causal"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == 3 and all(line.startswith("FAILED entropy: ") for line in failed)
    assert lines[-1] == "done 6 cases, 3 failed"


@needs_kernels
def test_after_a_fault_nothing_runs(capsys, monkeypatch):
    def faults(p, backend):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    kind = check.KINDS["decode"]._replace(function=faults)
    monkeypatch.setitem(check.KINDS, "decode", kind)
    assert check.main([*ON_CPU, "decode"]) == 1
    first, failed, done = capsys.readouterr().out.splitlines()
    assert first.startswith("case decode ")
    assert failed.endswith("illegal memory access was encountered")
    assert done == "done 1 cases, 1 failed"


def test_no_case_at_all_is_no_proof(capsys):
    assert check.main(["--backend", "reference", "--device", "cpu", "--names", "no-such"]) == 1
    assert capsys.readouterr().out == "done 0 cases, 0 failed\n"
