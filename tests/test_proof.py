"""What has been proved on a GPU is chosen there, and nothing else; `fastattn check` proves it."""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn import backend_cuda, backend_triton, backends, library, proof
from fastattn.problem import AttentionProblem, CrossEntropyProblem

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    proof.proved.cache_clear()
    yield
    proof.proved.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A pretended H100 with kernels for it."""
    monkeypatch.setattr(library, "emulated", lambda: False)
    for module in (backend_cuda, backend_triton):
        monkeypatch.setattr(module, "unusable", lambda: None)
        monkeypatch.setattr(module, "fingerprint", lambda: "of these kernels")
    monkeypatch.setattr(backend_cuda, "arch", lambda t: 90)
    monkeypatch.setattr(backend_cuda, "_no_image", lambda arch: None)
    monkeypatch.setattr(backend_triton, "interpreted", lambda: False)
    monkeypatch.setattr(backend_triton, "_unfit", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def problems():
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        logits, target = torch.empty(4, 7, device="cuda"), torch.empty(4, device="cuda").long()
        return AttentionProblem(q, k, v), CrossEntropyProblem(logits, target)


def test_only_what_passed_is_chosen(gpu):
    attention, loss = problems()
    verdict = dict(backends.explain_problem(attention, None).rows)["cuda"]
    assert "not been proved on this GPU: `fastattn check`" in verdict
    assert backends.choose(attention, "cuda").name == "cuda"  # asked for
    proof.keep("triton", GPU, ["attention"])
    assert backends.choose(attention, None).name == "triton"
    with pytest.warns(UserWarning, match="fastattn check"):
        backends._warn_once.cache_clear()
        assert backends.choose(loss, None).name == "reference"
    proof.keep("cuda", GPU, ["attention", "cross_entropy"])
    assert backends.choose(attention, None).name == "cuda"
    assert backends.choose(loss, None).name == "cuda"


def test_other_kernels_and_other_gpus_are_not_proved_by_it(gpu, monkeypatch):
    proof.keep("cuda", GPU, ["attention"])
    assert proof.proved("cuda", GPU) == {"attention"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    proof.proved.cache_clear()
    assert not proof.proved("cuda", GPU)
    monkeypatch.undo()
    proof.proved.cache_clear()


def test_rebuilt_kernels_are_to_be_proved_again(gpu, monkeypatch):
    proof.keep("cuda", GPU, ["attention"])
    monkeypatch.setattr(backend_cuda, "fingerprint", lambda: "of others")
    proof.proved.cache_clear()
    assert not proof.proved("cuda", GPU)


@pytest.mark.parametrize("content", ["", "[1]", '{"NVIDIA H100, sm_90": {"cuda": 1}}'])
def test_a_damaged_file_proves_nothing(gpu, content):
    proof.file().parent.mkdir()
    proof.file().write_text(content)
    assert not proof.proved("cuda", GPU)
    proof.keep("cuda", GPU, ["decode"])
    assert proof.proved("cuda", GPU) == {"decode"}


def test_fingerprints_are_of_the_kernels(tmp_path, monkeypatch):
    file = tmp_path / "_cuda.so"
    file.write_bytes(b"kernels")
    monkeypatch.setattr(library, "cuda_file", lambda: file)
    first = backend_cuda.fingerprint.__wrapped__()
    file.write_bytes(b"other kernels")
    assert backend_cuda.fingerprint.__wrapped__() != first
    if backend_triton._no_triton() is None:
        assert backend_triton.fingerprint().startswith("triton ")


def test_proving_goes_on_to_the_first_that_passes_all(gpu, monkeypatch, capsys):
    def watch(command, patience):
        fails = "cuda" in command and "decode" in command
        return proof.Verdict(not fails, "3 cases, 1 failed" if fails else "3 cases, 0 failed")

    monkeypatch.setattr(proof, "watch", watch)
    assert proof.main([]) == 0
    assert proof.proved("cuda", GPU) == set(proof.KIND_OF.values()) - {"decode"}
    assert proof.proved("triton", GPU) == set(proof.KIND_OF.values())
    assert proof.all_proved("triton", GPU) and not proof.all_proved("cuda", GPU)
    printed = capsys.readouterr().out
    assert printed.startswith("NVIDIA H100, sm_90\n")
    assert "triton's kernels are now chosen" in printed
    assert proof.main(["--backend", "cuda"]) == 1


def test_a_backend_that_cannot_run_says_why(gpu, monkeypatch, capsys):
    monkeypatch.setattr(backend_cuda, "unusable", lambda: "there is no library")
    assert proof.main(["--backend", "cuda"]) == 1
    assert "cuda    not usable: there is no library" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no GPU here"):
        proof.main([])


# --- watching -------------------------------------------------------------------------------------


def script(*lines: str) -> list[str]:
    return [sys.executable, "-c", "import os, sys, time\n" + "\n".join(lines)]


def test_watching_one_that_passes():
    command = script("print('case a'); print('a warning'); print('done 1 cases, 0 failed')")
    assert proof.watch(command, 60) == (True, "1 cases, 0 failed")


def test_watching_one_that_fails():
    command = script(
        "print('case a'); print('FAILED out: too far'); print('case b')",
        "print('done 2 cases, 1 failed'); sys.exit(1)",
    )
    assert proof.watch(command, 60) == (False, "2 cases, 1 failed\n  a: out: too far")


def test_watching_one_that_hangs():
    verdict = proof.watch(script("print('case a', flush=True); time.sleep(60)"), 0.5)
    assert verdict == (False, "stopped in a: took over 0.5 s")


def test_watching_one_that_crashes():
    verdict = proof.watch(script("print('case a', flush=True); os.abort()"), 60)
    assert not verdict.passed and verdict.text.startswith("stopped in a: exit status -6")


def test_watching_one_that_cannot_start():
    verdict = proof.watch(script("raise ImportError('no such thing')"), 60)
    assert not verdict.passed and "stopped in its start: exit status 1" in verdict.text
    assert "ImportError: no such thing" in verdict.text


@pytest.mark.skipif(library.load_error() is not None, reason="no compiled kernels")
def test_the_command_holds_real_kernels():
    command = [*proof.command("cpu", CPU, "cross_entropy"), "--names", "plain"]
    assert proof.watch(command, 60) == (True, "3 cases, 0 failed")
