"""`make gpu` as far as it goes without a GPU: its journal, its probes, and a dry run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import emulated
import pytest
import torch
from gpu import calibration, parts
from gpu.__main__ import main
from gpu.journal import ROOT, Journal, Outcome, Step, run_part, summary
from torch import Tensor

MACHINE = {"device": "a GPU", "sources": "1234"}
FAR = time.monotonic() + 1e6


def passes(seconds: float) -> Outcome:
    return Outcome("passed", "well")


def fails(seconds: float) -> Outcome:
    raise ValueError("a reason")


def hangs(seconds: float) -> Outcome:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(9)"], timeout=min(seconds, 0.1))
    return Outcome("passed")


# --- the journal ----------------------------------------------------------------------------------


def test_every_step_is_on_disk_when_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "a" / "journal.json"
    journal = Journal(file, MACHINE)
    run_part("test", [Step("one", passes), Step("two", fails)], journal, FAR)
    steps = json.loads(file.read_text())["parts"]["test"]
    assert steps["one"]["state"] == "passed" and steps["two"]["state"] == "failed"
    assert "ValueError: a reason" in steps["two"]["text"]
    assert summary(journal).splitlines()[0].startswith("FAILED test/two: ValueError")
    assert summary(journal).endswith("1 passed, 1 failed")


def test_a_later_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "journal.json"
    run_part("test", [Step("one", passes), Step("two", fails)], Journal(file, MACHINE), FAR)
    journal = Journal(file, MACHINE)
    run_part("test", [Step("one", fails), Step("two", passes)], journal, FAR)
    assert not journal.of_state("failed")
    assert re.search(r"test/one +passed before", capsys.readouterr().out)
    run_part("test", [Step("one", fails)], journal, FAR, again=True)
    assert journal.of_state("failed")


def test_other_sources_begin_anew(tmp_path: Path) -> None:
    file = tmp_path / "journal.json"
    run_part("test", [Step("one", passes)], Journal(file, MACHINE), FAR)
    assert Journal(file, MACHINE).has_passed("test", "one")
    assert not Journal(file, MACHINE | {"sources": "5678"}).has_passed("test", "one")


def test_no_step_begins_without_time_and_none_hangs(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.json", MACHINE)
    run_part("test", [Step("late", fails)], journal, time.monotonic() + 1)
    run_part("test", [Step("slow", hangs)], journal, time.monotonic() + 100)
    run_part("test", [Step("hung", hangs, limit=50)], journal, FAR)
    states = {name: entry["state"] for name, entry in journal.parts["test"].items()}
    assert states == {"late": "cut", "slow": "cut", "hung": "failed"}


def test_junit_reports(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"

    def outcome(*cases: str) -> Outcome:
        report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
        return parts.outcome_of(report)

    good, skipped = '<testcase name="a"/>', '<testcase name="b"><skipped message="no"/></testcase>'
    bad = '<testcase name="c"><failure message="too far"/></testcase>'
    assert outcome(good, skipped)[:2] == ("passed", "1 passed, 1 skipped, 0 failed")
    assert outcome(skipped).state == outcome().state == "skipped"
    failed = outcome(good, bad)
    assert failed.state == "failed" and "c: too far" in failed.text
    assert failed.detail["failures"] == ["c: too far"]


def test_files_with_tests_of_backends_are_run() -> None:
    names = {file.stem for file in parts.Gpu("a GPU", 90, "nvcc").test_files()}
    assert {"test_attention", "test_decode", "test_losses", "test_ops"} <= names
    assert "test_tokenizer" not in names


def test_the_package_needs_no_installation() -> None:
    code = "import fastattn.kernels, fastattn.bundled, fastattn; print(fastattn.__file__)"
    environment = {"PYTHONPATH": parts.python_path()}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.stdout.strip().endswith("build/gpu/packages/fastattn/__init__.py"), done.stderr


# --- calibration ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> calibration.Library:
    if (reason := emulated.why_not()) is not None:
        pytest.skip(reason)
    return calibration.Library(calibration.compile_for_emulator())


class Wrong(calibration.Library):
    """A GPU that gets one bit of one word wrong."""

    def __init__(self, right: calibration.Library, bit: int) -> None:
        self._library = right._library
        self.bit = bit

    def run(self, name: str, words: Tensor) -> Tensor:
        out = super().run(name, words)
        out[3, 7, -1] ^= 1 << self.bit
        return out


def test_every_instruction_has_a_probe(ours: calibration.Library) -> None:
    assert sorted(ours.names()) == sorted(calibration.PROBES)
    header = (ROOT / "csrc" / "cuda" / "ptx.cuh").read_text()
    functions = set(re.findall(r"FASTATTN_DEVICE \w+ (\w+)\(", header)) - {"shared_address"}
    probed = set(re.findall(r"ptx::(\w+)", calibration.SOURCE.read_text()))
    assert functions == probed


@pytest.mark.parametrize("name", calibration.PROBES)
def test_differences_are_seen(ours: calibration.Library, name: str) -> None:
    assert all(d.passed for d in calibration.compare(name, ours, ours, blocks=8))
    # NaN is like NaN: 27 reaches into the exponent of any format, and leaves few of them alike
    seen = calibration.compare(name, Wrong(ours, 27), ours, blocks=8)
    assert any(not d.passed for d in seen)
    assert "block 3, thread 7" in next(d for d in seen if not d.passed).worst
    if calibration.comparison_of(name, "integers")(*[torch.zeros(1, 1, 1).int()] * 3)[1] == 0:
        assert not calibration.compare(name, Wrong(ours, 0), ours, blocks=8)[0].passed


@pytest.mark.parametrize("name", [n for n in calibration.PROBES if n.startswith("mma_")])
def test_sums_of_the_exact_inputs_are_exact(ours: calibration.Library, name: str) -> None:
    shape = (4, *ours.shape(name)[:2])
    for kind, words in calibration.mma_inputs(name, shape)[:2]:
        a, b, d, _ = calibration.operands_of(name, words)
        exact = calibration.fragments_of(a @ b + d)
        assert torch.equal(ours.run(name, words).view(torch.float32).double(), exact), kind
        assert exact.abs().max() > 1


def test_probes_compile_for_a_gpu(tmp_path: Path) -> None:
    if (nvcc := parts.nvcc.find()) is None:
        pytest.skip("there is no nvcc")
    library = calibration.compile_for_gpu(nvcc, 80, tmp_path / "libcalibration.so")
    assert sorted(calibration.Library(library).names()) == sorted(calibration.PROBES)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["build", "--results", str(tmp_path)]) == 1
    assert "make gpu: torch" in capsys.readouterr().out


def test_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Everything but the GPU: also the processes that pytest and compute-sanitizer would watch."""
    if (reason := emulated.why_not()) is not None:
        pytest.skip(reason)
    assert main(["--dry-run", "test", "sanitize", "bench", "--results", str(tmp_path)]) == 0
    (file,) = (tmp_path / "dry-run").glob("gpu-*.json")
    found = json.loads(file.read_text())
    assert found["machine"]["arch"] == 80 and len(found["machine"]["sources"]) == 12
    assert found["parts"]["test"]["test_attention"]["tests"] == 3
    assert "0 failed" in found["parts"]["sanitize"]["memcheck"]["text"]
    assert "07_ping_pong" in found["parts"]["bench"]["ladder"]["text"]
    with pytest.raises(SystemExit):
        main(["--dry-run", "trst"])
