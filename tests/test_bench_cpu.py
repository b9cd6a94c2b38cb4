"""The CPU's table of goals: its rows are the suites' cases, and it says which goals are met."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import bench_cpu, ceilings, cpu_table, results, suites
from benchmarks.case import short
from benchmarks.cpu_table import Goal, table
from benchmarks.runner import key_of

ROOT = Path(__file__).resolve().parent.parent


def result(case, ours, theirs, share=0.5):
    suite, name, dtype = key_of(case)
    peers = {
        "fastattn cpu": {"ours": True, "seconds": {"median": ours}, "share_of_floor": share},
        case.baseline: {"seconds": {"median": theirs}},
    }
    names = {"suite": suite, "case": name, "dtype": dtype, "baseline": case.baseline}
    return names | {"bound": "memory", "peers": peers}


def test_every_row_of_the_table_is_a_case_of_the_suites():
    rows = list(cpu_table.rows())
    attention = [case for case, _ in rows if case.suite.startswith("attention")]
    assert len(attention) == 2 * 2 * 2 * 4  # dtypes, passes, full or causal, shapes
    assert {case.passes for case in attention} == {"fwd", "fwd+bwd"}
    count = {s: sum(case.suite == s for case, _ in rows) for s in suites.SUITES}
    assert (count["decode"], count["cross-entropy"], count["linear-cross-entropy"]) == (4, 6, 2)
    goals = {key_of(case): goal for case, goal in rows}
    assert len(goals) == len(rows)
    causal = ("attention-bwd", "B8 S256 H6 D64 causal fwd+bwd", "bfloat16")
    assert goals[causal] == Goal(4.5)
    assert goals["decode", "B8 H32/8 keys 4096 D128", "float32"] == Goal(2.7, 0.9)
    assert goals["cross-entropy", "N2048 V50257 fwd+bwd in place", "bfloat16"] == Goal(7.0)


def test_held_to_avx2_there_are_goals_for_attention_alone():
    goals = list(cpu_table.held_rows())
    assert len(goals) == 16 + 8  # all of fp32, and bf16 with its backward pass
    assert all(goal.ratio == 5 for case, goal in goals if short(case.dtype) == "bf16")


def test_the_table_says_which_goals_are_met():
    case, other = [case for case, _ in cpu_table.rows()][:2]
    found = {"results": [result(case, 0.010, 0.025)]}
    for goal, words in (
        (Goal(2.5), "2.50  met"),
        (Goal(2.6), "2.60  MISSED"),
        (Goal(2.5, share=0.6), "2.50, 60% of the floor  MISSED"),
    ):
        lines = table([(case, goal), (other, Goal(1.0))], found).splitlines()
        figures = lines[1].removeprefix(case.name).split()
        assert figures == ["fp32", "10", "25", "2.50", "50%", "memory", *words.split()]
        assert "not measured" in lines[2]
    assert lines[-1] == "0 goals met, 1 missed"


def test_a_run_is_cut_and_gone_on_with(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 1 << 20)})
    monkeypatch.setattr(ceilings, "FMA_ROUNDS", 1000)
    few = [pair for pair in cpu_table.rows() if "S256" in pair[0].name][:2]
    monkeypatch.setattr(cpu_table, "rows", lambda: iter(few))
    out = tmp_path / "run.json"
    arguments = ["--out", str(out), "--seconds", "0.01"]
    assert cpu_table.main([*arguments, "--budget", "1e-9"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 2 and "the same command goes on" in printed
    assert cpu_table.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "not measured" not in printed and "goes on" not in printed
    document = results.read(out)
    assert str(tmp_path) not in str(document["options"])  # a record names no folder of a machine
    found = document["results"]
    assert [set(results.timed(r)) for r in found] == [{"fastattn cpu", "torch SDPA"}] * 2
    assert (tmp_path / "run-attention-fwd.png").exists()


def test_what_was_asked_for_is_what_runs(tmp_path):
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("nothing wider here")
    with pytest.raises(SystemExit, match="avx2 was asked for, but it is"):
        cpu_table.main(["--isa", "avx2", "--out", str(tmp_path)])


def test_both_are_held_before_torch_is_loaded(monkeypatch):
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    monkeypatch.setenv("OMP_PLACES", "threads")  # what is there stays
    found = bench_cpu.environment(["--budget", "3", "--isa=avx2"])
    assert found == {"OMP_PROC_BIND": "true", **bench_cpu.HELD["avx2"]}
    code = "import sys, benchmarks.bench_cpu; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("command", [["-m", "benchmarks.bench_cpu"], ["benchmarks/bench_cpu.py"]])
def test_it_runs_as_a_module_and_as_a_file(command):
    run = subprocess.run(
        [sys.executable, *command, "--isa", "avx2", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--isa {avx2}" in run.stdout
