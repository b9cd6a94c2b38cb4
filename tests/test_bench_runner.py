"""A run: what is refused, what lands on disk, what a time budget leaves out."""

from dataclasses import dataclass

import pytest
import torch

from benchmarks import ceilings, machine, results, runner, supervise
from benchmarks.case import Call, Case, Peer
from benchmarks.device import Cpu
from benchmarks.runner import Plan, Run, matching, reason_of
from fastattn.files import read_json

SUITE = frozenset({"decode"})


@dataclass(frozen=True, kw_only=True)
class Double(Case):
    """2 · x."""

    suite: str = "decode"
    dtype: torch.dtype = torch.float32
    number: int = 1
    once: bool = False

    @property
    def name(self):
        return f"N{self.number}"

    @property
    def flops(self):
        return 1e6

    def inputs(self, device):
        return {"x": torch.arange(8.0)}

    def exact(self, inputs):
        return {"out": 2 * inputs["x"].double()}

    def parts(self, name, result):
        return result


def peer(name, function, **options):
    def prepare(case, inputs):
        return Call(lambda: function(inputs["x"]), lambda out: {"out": out}, facts={"bytes": 7})

    return Peer(name=name, suites=SUITE, prepare=prepare, **options)


def fails(x):
    raise RuntimeError("no kernel\nfor this")


PEERS = [
    peer("fastattn cpu", lambda x: 2 * x, backend="cpu"),
    peer("torch", lambda x: x + x),
    peer("nearly", lambda x: 2 * x + 0.01),
    peer("wrong", lambda x: 3 * x),
    peer("nan", lambda x: x * torch.nan),
    peer("fails", fails),
    peer("absent", lambda x: x, module="no_such_package"),
    peer("elsewhere", lambda x: x, devices=("cuda",)),
    peer("compiles", lambda x: 2 * x, compiles=True),
]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    def measure(self, dtypes):
        self.gemm, self.memory = {"float32": 1e9}, 1e9

    monkeypatch.setattr(ceilings.Ceilings, "measure", measure)


def plan(tmp_path, cases, **options):
    options = {"seconds": 0.001, "peers": PEERS} | options
    return Plan(Cpu(), cases, out=tmp_path / "kind" / "run.json", **options)


def test_each_peer_is_timed_or_told_why_not(tmp_path):
    run = Run(plan(tmp_path, [Double()], quick=True))
    assert run()
    document = results.read(tmp_path / "kind" / "run.json")
    (result,) = document["results"]
    refused = {name: p["refused"] for name, p in result["peers"].items() if "refused" in p}
    assert refused == {
        "wrong": "wrong: the error of out is 7, its largest 14",
        "nan": "wrong: the error of out is inf, its largest 14",
        "fails": "no kernel",
        "absent": "not installed",
        "elsewhere": "not for cpu",
        "compiles": "compiles: only in cases of rank 0 of a full run, or if named by --peer",
    }
    assert set(results.timed(result)) == {"fastattn cpu", "torch", "nearly"}
    assert result["peers"]["nearly"]["errors"]["out"] == pytest.approx(0.01, rel=1e-3)
    assert result["floor_seconds"] == 1e-3 and result["bound"] == "compute"
    ours = result["peers"]["fastattn cpu"]
    assert ours["ours"] and ours["share_of_floor"] == 1e-3 / ours["seconds"]["median"]
    assert results.ratio(result) == pytest.approx(
        result["peers"]["torch"]["seconds"]["median"] / ours["seconds"]["median"]
    )
    assert document["complete"] and document["clocks"]


class Reads(Double):
    moved_bytes, streaming = 4000.0, "read"


def test_memory_is_timed_beside_what_it_bounds(tmp_path):
    run = Run(plan(tmp_path, [Reads()], peers=PEERS[:2]))
    assert run()
    (result,) = results.read(run.plan.out)["results"]
    assert set(result["peers"]) == {"fastattn cpu", "torch"}
    assert result["streaming_seconds"] > 0
    assert result["floor_seconds"] == max(1e-3, result["streaming_seconds"])


def test_peers_are_timed_where_memory_beside_them_can_not_be(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "streaming", lambda case: Call(lambda: fails(0), lambda _: {}))
    run = Run(plan(tmp_path, [Reads()], peers=PEERS[:2]))
    assert run()
    (result,) = run.document["results"]
    assert all("seconds" in found for found in result["peers"].values())
    assert "streaming_seconds" not in result and result["bound"] == "compute"


def test_compiling_peers_join_the_most_telling_cases(tmp_path):
    run = Run(plan(tmp_path, [Double(number=1, rank=0), Double(number=2, rank=1)]))
    run()
    telling, other = run.document["results"]
    assert "compiles" in results.timed(telling) and "compiles" not in results.timed(other)


def test_compiling_peers_join_if_named(tmp_path):
    run = Run(plan(tmp_path, [Double()], quick=True, named=frozenset({"compiles"})))
    run()
    assert "compiles" in results.timed(run.document["results"][0])


def test_every_finished_case_is_on_disk_when_a_run_is_cut(tmp_path):
    cases = [Double(number=n) for n in range(3)]
    seen = []

    def begin(case):
        if case.number == 2:
            seen.append(results.read(tmp_path / "kind" / "run.json"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(plan(tmp_path, cases))(begin)
    assert [r["case"] for r in seen[0]["results"]] == ["N0", "N1"]
    assert not seen[0]["complete"]
    assert results.timed(seen[0]["results"][1])["torch"]["share_of_floor"] > 0


def test_a_budget_takes_the_most_telling_first_and_stops_in_time(tmp_path):
    now = iter(range(0, 10_000, 1)).__next__
    cases = [Double(number=n, rank=rank) for n, rank in ((1, 2), (2, 0), (3, 1), (4, 0))]
    run = Run(plan(tmp_path, cases, budget=60.0), now=lambda: float(now()))
    assert not run()
    names = [r["case"] for r in run.document["results"]]
    assert names[:2] == ["N2", "N4"] and 2 <= len(names) < 4
    assert run.document["seconds"] < 90
    assert ["decode", "N1", "float32"] in run.document["missing"]
    other = Run(plan(tmp_path, [Double(number=7)], resume=True))  # as with other filters
    assert other() and not other.document["complete"]
    assert ["decode", "N1", "float32"] in other.document["missing"]
    again = Run(plan(tmp_path, cases, resume=True))
    assert again() and again.document["complete"] and not again.document["missing"]


def test_a_slow_peer_is_left_out_but_never_ours_or_the_baseline(tmp_path):
    now = iter(range(10_000)).__next__  # every call takes a second
    run = Run(plan(tmp_path, [Double()]), now=lambda: float(now()))
    run()
    found = run.document["results"][0]["peers"]
    assert found["nearly"]["refused"].startswith("a call takes over 0.004 s: too slow")
    assert "seconds" in found["torch"] and "seconds" in found["fastattn cpu"]


def test_what_takes_too_long_to_repeat_is_done_once(tmp_path):
    run = Run(plan(tmp_path, [Double(once=True)], peers=PEERS[:1]))
    run()
    ours = run.document["results"][0]["peers"]["fastattn cpu"]
    assert ours["seconds"]["rounds"] == 1 and ours["facts"] == {"bytes": 7}


def test_a_peer_that_takes_the_process_down_twice_is_left_out_of_the_suite(tmp_path):
    cases = [Double(number=n) for n in range(3)]
    run = Run(plan(tmp_path, cases))
    lost = {"suite": "decode", "dtype": "float32", "peer": "nearly", "reason": "killed by signal 6"}
    run.document["lost"] = [lost | {"case": "N0"}]
    run.document["lost"].append(lost | {"case": "N1", "suite": "varlen"})
    assert run.left_out(PEERS[2], cases[0]) == "killed by signal 6"
    assert run.left_out(PEERS[2], cases[2]) is None
    run.document["lost"].append(lost | {"case": "N1"})
    assert run.left_out(PEERS[2], cases[2]) == "it took 2 cases of the suite down with it"
    assert run.left_out(PEERS[1], cases[2]) is None


def test_a_long_case_does_not_keep_short_ones_of_other_suites_out(tmp_path):
    """Two cases of 40 s and three of 5 s fit in 100 s."""
    clock = [0.0]
    cases = [Double(number=n, rank=n) for n in (0, 2, 3)]
    cases += [Double(suite="train-step", number=n, rank=1) for n in (1, 2, 3)]
    run = Run(plan(tmp_path, cases, budget=100.0), now=lambda: clock[0])

    def begin(case):
        clock[0] += 40 if case.suite == "train-step" else 5

    assert not run(begin)
    found = [f"{r['suite']} {r['case']}" for r in run.document["results"]]
    assert found == ["decode N0", "train-step N1", "train-step N2", "decode N2", "decode N3"]


def test_sdpa_s_reasons_stand_in_its_warnings():
    told = [
        "Memory efficient kernel not used because: (Triggered internally at a.cpp:1.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at a.cpp:2.)",
        "cuDNN attention kernel not used because: (Triggered internally at a.cpp:3.)",
        "cuDNN does not support D 257. (Triggered internally at a.cpp:4.)",
    ]
    error = RuntimeError("No available kernel. Aborting execution.")
    assert reason_of(error, told) == "cuDNN does not support D 257."
    assert reason_of(error) == "No available kernel. Aborting execution."


def test_without_git_the_commit_is_what_the_environment_says(monkeypatch):
    assert machine.commit() != "unknown"
    monkeypatch.setattr(machine, "git", lambda *words: None)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("FASTATTN_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert machine.git("status") is None


def test_reasons_are_one_line():
    assert reason_of(RuntimeError("\n  first\nsecond")) == "first"
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(torch.OutOfMemoryError("tried to allocate")) == "out of memory"
    assert len(reason_of(ValueError("x" * 999))) == 160


def test_filters():
    cases = [Double(number=n, suite=suite) for n in (1, 12) for suite in ("decode", "varlen")]
    assert [c.suite for c in matching(cases, shape="n1")] == ["decode", "varlen"]
    assert [c.number for c in matching(cases, suites=("decode",))] == [1, 12]
    assert matching(cases, dtypes=("bfloat16",)) == []


def test_the_machine_is_stamped():
    stamp = machine.describe(torch.device("cpu"))
    assert stamp["threads"] == torch.get_num_threads() and stamp["torch"] == torch.__version__
    words = {"cpu": "Intel(R) Xeon(R) Processor @ 2.80GHz", "isa": "avx512", "threads": 2}
    words["torch_isa"] = "AVX512"
    assert machine.kind(words) == "intel-xeon-avx512-2-threads"
    words["isa"] = "avx2"
    assert machine.kind(words) == "intel-xeon-avx2-2-threads-torch-avx512"
    assert machine.kind(words | {"torch_isa": "AVX2"}) == "intel-xeon-avx2-2-threads"
    assert machine.kind({"gpu": "NVIDIA H200"}) == "nvidia-h200"


def test_gpu_clocks_are_what_nvidia_smi_says(monkeypatch):
    monkeypatch.setattr(machine, "nvidia_smi", lambda fields: "1980, 3201, 612.44, [N/A]")
    found = machine.clocks(torch.device("cuda"))
    assert found == {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "watts": 612.44, "celsius": None}
    monkeypatch.setattr(machine, "nvidia_smi", lambda fields: None)
    assert machine.clocks(torch.device("cuda")) == {"sm_mhz": None}


def test_a_run_goes_on_where_it_was_cut_without_what_was_lost(tmp_path):
    cases = [Double(number=n) for n in range(3)]
    first = Run(plan(tmp_path, cases[:1]))
    first()
    lost = {"suite": "decode", "dtype": "float32", "reason": "killed by signal 11"}
    document = results.read(first.plan.out)
    document["lost"] = [
        lost | {"case": "N1", "peer": "nearly"},
        lost | {"case": "N2", "peer": ""},
    ]
    results.write(first.plan.out, document)
    document["ceilings"]["memory_bytes"] = 5e9
    results.write(first.plan.out, document)
    run = Run(plan(tmp_path, cases, resume=True, supervised=True))
    assert run.ceilings.document() == document["ceilings"]
    assert run()
    assert results.read(first.plan.out)["complete"]
    zero, one, two = results.read(first.plan.out)["results"]
    assert zero == first.document["results"][0] | {"bound": "compute"}
    assert one["peers"]["nearly"]["refused"] == "killed by signal 11"
    assert "seconds" in one["peers"]["torch"]
    assert two["peers"]["torch"]["refused"] == "the case failed: killed by signal 11"


def test_a_file_of_another_machine_is_not_gone_on_with(tmp_path):
    first = Run(plan(tmp_path, [Double()]))
    first()
    first.document["machine"]["kind"] = "another"
    first.write()
    with pytest.raises(ValueError, match="is of another machine: another, not"):
        Run(plan(tmp_path, [Double()], resume=True))


def test_a_case_that_fails_as_a_whole_is_told(tmp_path):
    class Impossible(Double):
        def exact(self, inputs):
            raise torch.OutOfMemoryError("tried to allocate")

    run = Run(plan(tmp_path, [Impossible(), Double(number=2)]))
    assert run()
    first, second = run.document["results"]
    assert first["peers"]["torch"]["refused"] == "the case failed: out of memory"
    assert "seconds" in second["peers"]["torch"]


def test_a_peer_that_fails_when_all_take_turns_is_left_out_alone(tmp_path):
    """As one for whom there is no memory left beside the others."""
    calls = []

    def greedy(x):
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("tried to allocate")
        return 2 * x

    run = Run(plan(tmp_path, [Double()], peers=[PEERS[0], peer("greedy", greedy), PEERS[1]]))
    assert run()
    found = run.document["results"][0]["peers"]
    assert found["greedy"] == {"refused": "out of memory, when all took turns"}
    assert "seconds" in found["torch"] and "seconds" in found["fastattn cpu"]


def test_a_lost_device_ends_the_run(tmp_path, monkeypatch):
    def lost(self):
        raise supervise.DeviceLostError("unspecified launch failure")

    monkeypatch.setattr(Run, "tidy", lost)
    run = Run(plan(tmp_path, [Double()], supervised=True))
    with pytest.raises(supervise.DeviceLostError):
        run()
    assert read_json(supervise.note_path(run.plan.out))["key"]["peer"] == "wrong"
