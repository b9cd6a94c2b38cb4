"""`make gpu` as far as it goes without a GPU: its journal, its probes, and a dry run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from gpu import calibration, parts
from gpu import calibration_products as products
from gpu.__main__ import main
from gpu.calibration import wgmma
from gpu.journal import Journal, Outcome, Step, run_part, summary
from gpu.parts import nvcc
from torch import Tensor

from benchmarks.cli import LEFT_OUT

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


def test_what_another_machine_has_built_is_built_here_too(tmp_path: Path) -> None:
    file = tmp_path / "journal.json"
    run_part("build", [Step("kernels", passes, always=True)], Journal(file, MACHINE), FAR)
    journal = Journal(file, MACHINE)
    run_part("build", [Step("kernels", fails, always=True)], journal, FAR)
    assert journal.of_state("failed")
    assert parts.bench_steps(parts.Emulated())[0].always


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


def test_what_takes_too_long_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    target, number = parts.Emulated(), tmp_path / "pid"
    command = ["/bin/sh", "-c", f"sleep 60 & echo $! > {number}; wait"]
    with pytest.raises(subprocess.TimeoutExpired):
        parts.run(target, command, 0.5)
    process = Path(f"/proc/{number.read_text().strip()}/stat")
    for _ in range(50):  # it may be a zombie until its new parent looks
        if not process.exists() or process.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


@pytest.mark.parametrize("again", [False, True])
def test_benchmarks_that_ran_out_of_time_are_gone_on_with(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, commands = parts.Gpu("a GPU", 90, "nvcc"), []
    target.again = again

    def run(target: parts.Target, command: list[str], seconds: float) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, f"a table\n{LEFT_OUT} 9 of 151 cases\n")

    monkeypatch.setattr(parts, "run", run)
    outcome = parts.bench(target, 500.0)
    first = f"{LEFT_OUT} 9 of 151 cases: run it again to go on"
    assert outcome.state == "cut" and outcome.text.splitlines()[0] == first
    assert ("--resume" in commands[0]) != again and "ladder" not in commands[0]
    assert commands[0][-2:] == ["--budget", "455"]


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
    assert sorted(ours.names()) == sorted(calibration.probes(90))
    headers = [nvcc.HERE / "ptx.cuh", nvcc.HERE / "ptx_sm90.cuh"]
    pattern = r"FASTATTN_DEVICE \w+ (\w+)\("
    functions = {name for file in headers for name in re.findall(pattern, file.read_text())}
    functions |= set(re.findall(pattern, wgmma.function(64, "bf16", False)))
    text = "".join(file.read_text() for file in calibration.sources(90))
    assert functions - {"shared_address"} == set(re.findall(r"ptx::([a-z]\w+)", text))


def test_wgmma_is_probed_as_the_kernels_use_it() -> None:
    """Every way to have the operands; their shapes are those that wgmma.py writes."""
    used = set()
    for file in nvcc.HERE.glob("*.cuh"):
        used |= set(re.findall(r"ptx::wgmma<(?:Major::k(\w+), )?Major::k(\w+)>", file.read_text()))
    majors = {f"{a.lower() or 'registers'}_{b.lower()}" for a, b in used}
    assert majors == {name.split("_", 1)[1].rsplit("_", 2)[0] for name in products.WGMMA_PROBES}


def test_an_architecture_has_the_probes_of_its_functions() -> None:
    assert {file.name for file in calibration.HERE.glob("calibration*.cu")} == {
        file.name for file in calibration.sources(90)
    }
    last = [calibration.sources(arch)[-1].stem for arch in (75, 80, 89, 90, 100, 120)]
    assert [stem.removeprefix("calibration") for stem in last] == [
        "", "_sm80", "_sm80", "_sm90", "_sm80", "_sm80",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n in calibration.probes(90) if not n.startswith("wgmma") or "_64_" in n]
)
def test_differences_are_seen(ours: calibration.Library, name: str) -> None:
    blocks = 4 if name.startswith("wgmma") else 8
    assert all(d.passed for d in calibration.compare(name, ours, ours, blocks))
    # NaN is like NaN: 27 reaches into the exponent of any format, and leaves few of them alike
    seen = calibration.compare(name, Wrong(ours, 27), ours, blocks)
    assert any(not d.passed for d in seen)
    assert "block 3, thread 7" in next(d for d in seen if not d.passed).worst
    if calibration.comparison_of(name, "integers")(*[torch.zeros(1, 1, 1).int()] * 3)[1] == 0:
        assert not calibration.compare(name, Wrong(ours, 0), ours, blocks)[0].passed


@pytest.mark.parametrize("name", [n for n in calibration.probes(90) if products.is_product(n)])
def test_sums_of_the_exact_inputs_are_exact(ours: calibration.Library, name: str) -> None:
    shape = (2, *ours.shape(name)[:2])
    for kind, words in products.inputs(name, shape)[: 2 if name.startswith("mma") else 1]:
        a, b, d = products.operands(name, words)
        exact = products.fragments(name, a @ b + d)
        assert torch.equal(ours.run(name, words).view(torch.float32).double(), exact), kind
        assert exact.abs().max() > 1


def test_copies_and_barriers_move_every_word(ours: calibration.Library) -> None:
    """What the probes of sm_90 give is not nothing."""
    for name in calibration.PROBES[90][:8]:
        ((_, words),) = calibration.inputs_of(name, 8, *ours.shape(name)[:2])
        out = ours.run(name, words)
        assert out.ne(0).any(-1).any(-1).sum() >= 4, name
    words = products.random_bits((1, *ours.shape("mbarriers")[:2]))
    out = ours.run("mbarriers", words)
    assert torch.equal(out[0, :32], words[0, 32:]) and torch.equal(out[0, 32:], ~words[0, 32:])


@pytest.mark.parametrize("arch", [75, 80, pytest.param(90, marks=pytest.mark.slow)])
def test_probes_compile_for_a_gpu(tmp_path: Path, arch: int) -> None:
    if (compiler := nvcc.find()) is None:
        pytest.skip("there is no nvcc")
    library = calibration.compile_for_gpu(compiler, arch, tmp_path / "libcalibration.so")
    assert sorted(calibration.Library(library).names()) == sorted(calibration.probes(arch))


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["build", "--results", str(tmp_path)]) == 1
    assert "make gpu: torch" in capsys.readouterr().out


def test_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Everything but the GPU: also the processes that pytest and compute-sanitizer would watch."""
    if (reason := emulated.why_not()) is not None:
        pytest.skip(reason)
    assert (
        main(["--dry-run", "test", "triton", "sanitize", "bench", "--results", str(tmp_path)]) == 0
    )
    (file,) = (tmp_path / "dry-run").glob("gpu-*.json")
    found = json.loads(file.read_text())
    assert found["machine"]["arch"] == 80 and len(found["machine"]["sources"]) == 12
    assert found["parts"]["test"]["test_attention"]["tests"] == 3
    assert "0 failed" in found["parts"]["sanitize"]["memcheck"]["text"]
    assert "07_ping_pong" in found["parts"]["bench"]["ladder"]["text"]
    with pytest.raises(SystemExit):
        main(["--dry-run", "trst"])
