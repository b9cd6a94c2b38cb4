"""How the benchmarks time: the CPU's clock, and the GPU's with an imitation of torch.cuda."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device as devices
from benchmarks.case import Call
from benchmarks.device import Cpu, Cuda


def call(run, before=None):
    return Call(run, lambda _: {}, before)


def test_cpu_times_run_and_not_before():
    calls = {"slow": call(lambda: time.sleep(0.02), lambda: time.sleep(0.05)), "fast": call(int)}
    times = Cpu().times(calls, cold=True)
    assert 0.02 <= times["slow"] < 0.05 and times["fast"] < 0.01
    assert Cpu().probe() > 0 and Cpu().stolen_seconds() >= 0


class FakeCuda:
    """A stream that runs what it is told at once; its clock counts what was enqueued."""

    def __init__(self):
        self.log, self.milliseconds = [], 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.milliseconds
                fake.log.append("event")

            def elapsed_time(self, end):
                assert fake.log[-1] == "synchronize", "read before the device was done"
                return end.at - self.at

        self.Event = Event

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1024)

    def _sleep(self, cycles):
        self.log.append("sleep")
        self.milliseconds += 1.0

    def synchronize(self):
        self.log.append("synchronize")

    def work(self, name, milliseconds):
        def run():
            self.log.append(name)
            self.milliseconds += milliseconds

        return run


def test_cuda_times_between_events_on_a_busy_stream_with_a_cold_cache():
    cuda = FakeCuda()
    gpu = Cuda(cuda, "cpu")
    gpu._flush.fill_(1)
    calls = {
        "a": call(cuda.work("a", 3.0), cuda.work("before", 7.0)),
        "b": call(cuda.work("b", 5.0)),
    }
    assert gpu.times(calls, cold=True) == {"a": pytest.approx(3e-3), "b": pytest.approx(5e-3)}
    one = ["sleep", "event", "{}", "event"]
    expected = ["before", *one, *one, "synchronize"]
    expected[3], expected[7] = "a", "b"
    assert cuda.log == expected
    assert gpu._flush.numel() == 4096 and not gpu._flush.any()
    cuda.log.clear()
    gpu.times({"b": call(cuda.work("b", 5.0))}, cold=False)
    assert "sleep" not in cuda.log
    assert gpu.probe() == gpu.probe() and gpu.stolen_seconds() == 0


def test_find():
    assert isinstance(devices.find("cpu"), Cpu)
    if not torch.cuda.is_available():
        assert isinstance(devices.find(None), Cpu)
        with pytest.raises(RuntimeError, match="no CUDA device"):
            devices.find("cuda")
