"""A run survives what takes its process down."""

import json
import os
import signal
import sys

import pytest
from test_bench_report import document

from benchmarks import CORES, results, supervise
from benchmarks.supervise import DEVICE_LOST
from benchmarks.supervise import supervise as run

KEY = {"suite": "decode", "case": "N1", "dtype": "bfloat16", "peer": "fastattn cuda"}


def child(code, out, compiles=False):
    """A process that notes what it tries, and then runs the code."""
    noted = json.dumps({"key": KEY, "compiles": compiles})
    note = f"Path({str(supervise.note_path(out))!r}).write_text({noted!r})"
    return [sys.executable, "-c", f"import os, sys, time; from pathlib import Path; {note}; {code}"]


@pytest.fixture
def out(tmp_path):
    results.write(tmp_path / "run.json", document())
    return tmp_path / "run.json"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.abort()", f"killed by signal {int(signal.SIGABRT)}"),
        (f"sys.exit({DEVICE_LOST})", "the device was lost"),
        ("time.sleep(60)", "no sign of life for 2 s"),
    ],
)
def test_what_was_tried_is_lost_and_the_rest_goes_on(code, reason, out):
    codes = iter([code, "sys.exit(0)"])
    assert run(lambda left: child(next(codes), out), out, None, stalled=2) == 0
    assert results.read(out)["lost"] == [KEY | {"reason": reason}]
    assert not supervise.note_path(out).exists()


def test_a_child_that_ends_by_itself_ends_the_run(out):
    seen = []

    def command(left):
        seen.append(left)
        return [sys.executable, "-c", "import sys; sys.exit(1)"]

    assert run(command, out, 100.0) == 1
    assert 90 < seen[0] <= 100 and len(seen) == 1


def test_one_that_dies_before_it_tries_is_no_reason_to_go_on(out, capsys):
    assert run(lambda left: [sys.executable, "-c", "import os; os.abort()"], out, None) == 1
    assert "signal" in capsys.readouterr().out


def test_notes_say_what_is_tried(out):
    supervise.note(out, *KEY.values(), compiles=True)
    noted = json.loads(supervise.note_path(out).read_text())
    assert noted == {"key": KEY, "compiles": True}


def test_what_compiles_may_be_silent_for_longer(out):
    assert run(lambda left: child("time.sleep(1.5)", out, compiles=True), out, None, stalled=1) == 0
    assert "lost" not in results.read(out)


def test_a_child_may_use_every_core(out, monkeypatch):
    """However this process is bound: compilers run in the child."""
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    code = "sys.exit(0 if os.sched_getaffinity(0) == " + repr(set(CORES)) + " else 5)"
    os.sched_setaffinity(0, CORES[:1])
    try:
        assert run(lambda left: child(code, out), out, None) == 0
    finally:
        os.sched_setaffinity(0, CORES)
