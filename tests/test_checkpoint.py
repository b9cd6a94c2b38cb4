"""Checkpoints: every bit comes back, and a stop at any moment leaves a whole one to be found."""

from __future__ import annotations

import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastattn import checkpoint as checkpoint_module
from fastattn.checkpoint import latest, load, problem_with, prune, rng_state, save, set_rng_state
from fastattn.gpt import GPT, GPTConfig
from fastattn.optim import adamw, muon
from fastattn.sampler import WindowSampler

FILES = ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]


def small(value: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose weights and momenta are all `value`."""
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
            optimizer.state[parameter]["exp_avg"].fill_(value)
    return model, optimizer


def save_small(run_dir: Path, step: int, **kwargs) -> Path:
    return save(run_dir, step, *small(step), {"step": step}, **kwargs)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


# ---- what comes back ---------------------------------------------------------------------------


def test_layout(tmp_path: Path):
    path = save_small(tmp_path / "run", 1000)
    assert path == tmp_path / "run" / "step-00001000"
    assert names(path) == FILES
    assert names(tmp_path / "run") == ["step-00001000"]
    assert problem_with(path) is None


def test_every_bit_of_a_state_comes_back(tmp_path: Path):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 1.1])
    payload_nan = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)
    state = {
        "tensors": [special, special.double(), special.half(), payload_nan, torch.tensor(3)],
        "bytes": torch.arange(256, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12.0).view(3, 4).T,
        "bool": torch.tensor([True, False]),
        "floats": (0.1, 1e-320, math.inf, -0.0, 2.0**60),
        "ints": [2**80, -1],
        "nothing": None,
        "text": "naïve \U0001f600 $tensor",
        1: {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, "$tensor": "not one", (1, "x"): True},
        "1": {"a.b": torch.full((1,), 2.0)},
        "nested": ({"x": ()}, [], {}),
    }
    model, optimizer = small()
    back = load(save(tmp_path, 1, model, optimizer, state)).state
    assert_same(back, state)


def assert_same(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(b, Tensor):
        assert same_bits(a, b.contiguous())
    elif isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            assert_same(a[key], b[key])
    elif isinstance(b, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert repr(a) == repr(b)


def test_bfloat16_and_tied_weights(tmp_path: Path):
    model = nn.ModuleDict({"wte": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["wte"].weight
    model = model.bfloat16()
    back = load(save(tmp_path, 1, model, torch.optim.SGD(model.parameters())))
    assert sorted(back.model) == ["head.weight", "wte.weight"]
    for tensor in back.model.values():
        assert torch.equal(tensor, model["wte"].weight)
    back.restore(model)
    assert model["head"].weight is model["wte"].weight


def test_unknown_types_are_refused_before_writing(tmp_path: Path):
    with pytest.raises(TypeError, match=r"cannot hold a set \(at state\.a\.1\)"):
        save(tmp_path / "run", 1, *small(), {"a": [1, {2}]})
    with pytest.raises(TypeError, match="float64"):  # a NumPy number is not a JSON number
        save(tmp_path / "run", 1, *small(), np.float64(1.0))
    with pytest.raises(ValueError, match="keep_last"):
        save_small(tmp_path / "run", 1, keep_last=0)
    assert not (tmp_path / "run").exists()


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.randn(3), *torch.randn(3).tolist()]  # noqa: NPY002


def test_random_generators_come_back(tmp_path: Path):
    draws()  # leaves half a pair of normal numbers in Python's and NumPy's generators
    state = rng_state()
    first = draws()
    second = draws()
    set_rng_state(state)
    assert draws() == first
    model, optimizer = small()
    set_rng_state(state)
    assert draws() == first
    path = save(tmp_path, 1, model, optimizer)  # which draws nothing
    assert draws() == second
    load(path).restore(model, optimizer)
    assert draws() == second
    load(path).restore(model, optimizer)
    assert same_bits(torch.get_rng_state(), load(path).rng["torch"])


@pytest.mark.parametrize("make", [adamw, muon])
def test_resumed_training_is_bit_for_bit_the_same(tmp_path: Path, make):
    config = GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.2)
    tokens = np.random.default_rng(0).integers(0, 50, 200).astype(np.uint16)

    def start(seed: int) -> tuple[GPT, torch.optim.Optimizer, WindowSampler]:
        torch.manual_seed(seed)
        model = GPT(config)
        return model, make(model), WindowSampler(tokens, 8)

    def train(model: GPT, optimizer: torch.optim.Optimizer, sampler: WindowSampler) -> list[float]:
        losses = []
        for _ in range(4):
            loss = model(*sampler.batch(3), backend="reference")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer, sampler = start(0)
    train(model, optimizer, sampler)
    path = save(tmp_path, 4, model, optimizer, {"sampler": sampler.state_dict()})
    expected = train(model, optimizer, sampler)

    other, other_optimizer, other_sampler = start(1)
    checkpoint = load(path)
    for _ in range(2):  # a checkpoint can be restored again
        checkpoint.restore(other, other_optimizer)
        other_sampler.load_state_dict(checkpoint.state["sampler"])
        assert train(other, other_optimizer, other_sampler) == expected
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert same_bits(a.detach(), b.detach())


def test_a_checkpoint_of_another_model_does_not_fit(tmp_path: Path):
    path = save_small(tmp_path, 1)
    with pytest.raises(ValueError, match=r"(?s)does not fit: .*size mismatch"):
        load(path).restore(nn.Linear(5, 4))
    with pytest.raises(ValueError, match="does not fit"):
        load(path).restore(nn.Linear(5, 3), torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"fastattn\[train\]"):
        save_small(tmp_path, 1)
    assert names(tmp_path) == []


# ---- finding and pruning -----------------------------------------------------------------------


def test_latest_is_by_step(tmp_path: Path):
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None
    for step in (2, 10, 9, 123_456_789):
        save_small(tmp_path, step)
    assert latest(tmp_path).name == "step-123456789"
    shutil.rmtree(tmp_path / "step-123456789")
    assert latest(tmp_path).name == "step-00000010"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, os.remove], ids=lambda f: f.__name__)
def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path: Path, name: str, damage):
    save_small(tmp_path, 1)
    path = save_small(tmp_path, 2)
    damage(path / name)
    with pytest.warns(UserWarning, match=rf"skipping damaged checkpoint .*step-00000002: .*{name}"):
        assert latest(tmp_path).name == "step-00000001"
    with pytest.raises(ValueError, match="damaged"):
        load(path)
    damage(tmp_path / "step-00000001" / name)
    with pytest.raises(ValueError, match=r"no checkpoint is whole: .*00002: .*00001: "):
        latest(tmp_path)
    # one written anew in its place is whole, and nothing else is left
    save_small(tmp_path, 2)
    assert latest(tmp_path).name == "step-00000002"
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_folders_that_are_no_checkpoints(tmp_path: Path):
    save_small(tmp_path, 1)
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-00000006").write_text("a file")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000007")  # a lie about the step
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert latest(tmp_path).name == "step-00000001"
    assert len(caught) == 2
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "best")  # any other name is fine
    assert load(tmp_path / "best").step == 1
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path / "none")


def test_keep_last(tmp_path: Path):
    for step in range(1, 6):
        save_small(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    save_small(tmp_path, 3, keep_last=2)  # older than both: not kept
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_pruning_counts_only_whole_checkpoints(tmp_path: Path):
    for step in range(1, 5):
        save_small(tmp_path, step)
    truncate(tmp_path / "step-00000004" / "model.safetensors")
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    with pytest.raises(ValueError, match="keep_last"):
        prune(tmp_path, 0)


def test_saving_over_the_same_step_replaces_it(tmp_path: Path):
    save(tmp_path, 7, *small(1.0), "first")
    save(tmp_path, 7, *small(2.0), "second")
    assert load(latest(tmp_path)).state == "second"
    assert names(tmp_path) == ["step-00000007"]


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch):
    save_small(tmp_path, 1)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def full_disk_of_safetensors(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    for owner, name, fail in (
        (checkpoint_module, "sha256_of", full_disk),
        (safetensors.torch, "save_file", full_disk_of_safetensors),
    ):
        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(OSError, match="No space"):
            save_small(tmp_path, 2)
        monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]


# ---- stopped at any moment ---------------------------------------------------------------------


class Stop(BaseException):
    """As SIGKILL: no handler of Exception runs."""


class StopAt:
    """Stops at the n-th system call that changes the disk; files not yet synced lose their end."""

    CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")

    def __init__(self, n: int, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
        self.n, self.count, self.run_dir = n, 0, run_dir
        self.synced: set[int] = set()  # inodes
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name: str, call):
        def wrapped(*args, **kwargs):
            self.count += 1
            if self.count == self.n:
                raise Stop
            result = call(*args, **kwargs)
            if name == "fsync":
                self.synced.add(os.fstat(args[0]).st_ino)
            return result

        return wrapped

    def lose_power(self, old: set[int]) -> None:
        for path in self.run_dir.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.synced | old:
                os.truncate(path, path.stat().st_size // 2)


def inodes(run_dir: Path) -> set[int]:
    return {path.stat().st_ino for path in run_dir.rglob("*")}


@pytest.mark.parametrize("step", [2, 1])  # a new one, and one in the place of the first
def test_stop_at_each_system_call(tmp_path: Path, step: int):
    stops = 0
    for n in range(1, 200):
        run_dir = tmp_path / f"run-{n}"
        save(run_dir, 1, *small(1.0), "old")
        before = inodes(run_dir)
        with pytest.MonkeyPatch.context() as monkeypatch:
            stop = StopAt(n, run_dir, monkeypatch)
            try:
                save(run_dir, step, *small(2.0), "new", keep_last=1)
                break
            except Stop:
                stops += 1
        stop.lose_power(before)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # and nothing half done looks like a checkpoint
            found = load(latest(run_dir))
        assert (found.state, found.step) in {("old", 1), ("new", step)}
        assert (found.model["weight"] == {"old": 1.0, "new": 2.0}[found.state]).all()
        # the next save cleans up whatever is left
        save(run_dir, 3, *small(3.0), "next", keep_last=1)
        assert names(run_dir) == ["step-00000003"], n
        shutil.rmtree(run_dir)
    assert names(run_dir) == [f"step-{step:08d}"]
    assert stops >= 15  # more or fewer with Python's version, whose rmtree has some of them


# The children are forks, for each would need seconds to import torch. argv: run_dir, rounds
KILLED = """
    import os, random, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from fastattn.checkpoint import latest, load, save

    def content(step):  # every number is the step
        model = torch.nn.Linear(300, 300)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        return model, torch.optim.SGD(model.parameters(), lr=step), torch.full((9999,), step)

    def save_on_and_on(step, report):
        while True:
            os.write(report, step.to_bytes(8, "big"))  # saves up to here have returned
            step += 1
            for _ in range(2 if step % 3 == 0 else 1):  # twice: then a folder is replaced
                save(run_dir, step, *content(step), keep_last=2)

    run_dir, rounds, rng = sys.argv[1], int(sys.argv[2]), random.Random(0)
    save(run_dir + "-warm-up", 1, *content(1))  # imports what the children need
    start = time.perf_counter()
    save(run_dir + "-warm-up", 2, *content(2))
    duration = time.perf_counter() - start

    done, kills = 0, 0
    while kills < rounds or done < 5:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_on_and_on(done, send)
            finally:
                os._exit(1)  # only after an error, which the parent then finds
        os.close(send)
        os.read(receive, 8)  # it has begun
        time.sleep(rng.uniform(0, 2.5 * duration))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child had an error"
        kills += 1
        while reported := os.read(receive, 8):
            done = int.from_bytes(reported, "big")
        os.close(receive)

        path = latest(run_dir)
        assert path is not None or done == 0, "a finished save is gone"
        if path is not None:
            found = load(path)
            assert found.step in (done, done + 1), (found.step, done)
            model, optimizer, state = content(found.step)
            assert all(torch.equal(found.model[k], v) for k, v in model.state_dict().items())
            assert found.optimizer["param_groups"][0]["lr"] == found.step
            assert torch.equal(found.state, state)
            done = found.step
    print(kills, done)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_sigkill_at_random_moments(tmp_path: Path):
    """After each kill the newest checkpoint is the last finished, or the one being finished."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(KILLED)]
    result = subprocess.run([*command, str(tmp_path / "run"), "40"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    kills, done = map(int, result.stdout.split())
    assert kills >= 40 and done >= 5
