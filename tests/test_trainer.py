"""Training: resume bit for bit, accumulation, backends, signals, and what a run leaves behind."""

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastattn import checkpoint, pace, trainer
from fastattn.config import TrainConfig
from fastattn.data import prepare
from fastattn.gpt import GPTConfig
from fastattn.pace import Pace
from fastattn.report import read_log
from fastattn.trainer import StopSignals, Trainer, load_model, lr_factor, train

MODERN = GPTConfig(
    block_size=32, n_layer=2, n_head=2, n_embd=32, n_kv_head=1, norm="rmsnorm", mlp="swiglu",
    position="rope", qk_norm=True, bias=False,
)  # fmt: skip
GPT2 = GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("To be, or not to be, that is the question:\nWhether 'tis nobler.\n" * 60)
    prepare(text, "char", folder / "tokens")
    return folder / "tokens"


@pytest.fixture
def config(data, tmp_path):
    return TrainConfig(
        data=data, out=tmp_path / "run", model=MODERN, batch_size=2, tokens_per_step=128, steps=8,
        optimizer="muon", lr=3e-3, schedule="wsd", warmup_steps=2, eval_every=3, eval_tokens=128,
        sample_every=4, sample_tokens=5, checkpoint_every=0, backend="reference", plot=False,
    )  # fmt: skip


def events(folder, *names):
    """The log's lines of these kinds, without what the clock decides."""
    lines = [line for line in read_log(folder) if line["event"] in names]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def tensors_of(t):
    flat = {f"model.{name}": tensor for name, tensor in t.model.state_dict().items()}
    for index, state in t.optimizer.state_dict()["state"].items():
        flat |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    flat["rng"] = torch.get_rng_state()
    return flat


# ---- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        {"model": MODERN, "optimizer": "muon", "schedule": "wsd"},
        {"model": GPT2, "optimizer": "adamw", "schedule": "cosine"},  # with dropout
    ],
    ids=["modern-muon-wsd", "gpt2-adamw-cosine-dropout"],
)
def test_resumed_run_equals_a_straight_one_bit_for_bit(config, tmp_path, recipe, backend):
    config = dataclasses.replace(config, backend=backend, **recipe)
    straight = train(dataclasses.replace(config, out=tmp_path / "straight"))
    expected = tensors_of(straight)

    stopping = dataclasses.replace(config, out=tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, config.steps // 2)
        stopped = train(stopping)
    assert stopped.step == config.steps // 2
    torch.manual_seed(999)  # what another process would have
    resumed = train(trainer.read_config(tmp_path / "stopped"), resume=True)

    got = tensors_of(resumed)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert resumed.sampler.state_dict() == straight.sampler.state_dict()
    kinds = ("step", "eval", "sample")
    assert events(tmp_path / "stopped", *kinds) == events(tmp_path / "straight", *kinds)
    assert len(events(tmp_path / "straight", "step")) == config.steps


def stop_after(patch, step):
    """Make training believe in a Ctrl-C during that step."""
    take_step = Trainer.train_step

    def train_step(self):
        result = take_step(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    patch.setattr(Trainer, "train_step", train_step)


def test_interrupted_process_saves_says_how_to_resume_and_continues_the_same(config, tmp_path):
    # 150 steps are far from done when the signal comes, some steps after the first.
    flags = (
        f"--data {config.data} --preset nanogpt-cpu --steps 150 --batch-size 2 --no-plot "
        "--backend reference --checkpoint-every 0 --eval-every 0 --model.block-size 16 "
        "--model.n-layer 1 --model.n-embd 16 --model.n-head 2"
    )
    command = [sys.executable, "-m", "fastattn", "train", *flags.split()]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    out = tmp_path / "interrupted"
    process = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=env,
    )  # fmt: skip
    try:
        wait_for(lambda: (out / "log.jsonl").exists() and len(events(out, "step")) >= 3, process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert f"fastattn train --resume {out}" in stdout
    stopped_at = events(out, "step")[-1]["step"]
    assert stopped_at < 150
    saved = checkpoint.load(checkpoint.latest(out / "checkpoints"))
    assert saved.step == stopped_at

    resume = [sys.executable, "-m", "fastattn", "train", "--resume", str(out)]
    subprocess.run(resume, check=True, env=env, capture_output=True, timeout=120)
    straight = tmp_path / "straight"
    subprocess.run(
        [*command, "--out", str(straight)], check=True, env=env, capture_output=True, timeout=120
    )
    assert events(out, "step", "eval") == events(straight, "step", "eval")
    ours, theirs = (
        checkpoint.load(checkpoint.latest(folder / "checkpoints")) for folder in (out, straight)
    )
    assert all(torch.equal(ours.model[name], tensor) for name, tensor in theirs.model.items())


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_run_killed_before_its_first_checkpoint_starts_anew(config, monkeypatch):
    monkeypatch.setattr(Trainer, "save", lambda self, folder: None)
    train(dataclasses.replace(config, steps=3))
    monkeypatch.undo()
    resumed = train(dataclasses.replace(config, steps=3), resume=True)
    assert resumed.step == 3
    assert read_log(config.out)[0]["event"] == "config"
    assert [line["step"] for line in events(config.out, "step")] == [1, 2, 3]


def test_finished_run_resumed_stays_as_it_is(config):
    first = train(config)
    before = tensors_of(first)
    again = train(trainer.read_config(config.out), resume=True)
    assert again.step == config.steps
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(again).items())
    assert len(events(config.out, "step")) == config.steps


def test_resume_refuses_other_data(config, tmp_path):
    train(config)
    text = tmp_path / "other.txt"
    text.write_text("To be, or not to be, that is the question:\nWhether 'tis nobler.\n" * 61)
    prepare(text, "char", tmp_path / "other")
    with pytest.raises(ValueError, match="other data"):
        train(dataclasses.replace(config, data=tmp_path / "other"), resume=True)


def test_resume_refuses_another_model(config):
    train(config)
    wider = dataclasses.replace(config.model, n_embd=64)
    with pytest.raises(ValueError, match="does not fit"):
        train(dataclasses.replace(config, model=wider), resume=True)


def test_run_is_not_overwritten_unasked(config):
    train(config)
    with pytest.raises(FileExistsError, match="--resume"):
        train(config)
    train(dataclasses.replace(config, steps=2), overwrite=True)
    assert len(events(config.out, "step")) == 2
    assert checkpoint.latest(config.out / "checkpoints").name == "step-00000002"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Path("nowhere")}, "no dataset in nowhere"),
        ({"device": "cuda"}, "finds no GPU"),
        ({"backend": "cuda"}, "backend cuda can't be used here"),
        ({"backend": "cpuu"}, "no backend"),
        ({"model": dataclasses.replace(MODERN, block_size=1000)}, r"val\.bin has .* too few"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_run_removes_and_leaves_no_run(config, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("FASTATTN_EMULATE", raising=False)
    bad = dataclasses.replace(config, tokens_per_step=None, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(bad)
    assert not config.out.exists()
    (config.out / "checkpoints").mkdir(parents=True)  # another run
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(bad, overwrite=True)
    assert (config.out / "checkpoints").exists()


def test_resume_without_a_whole_checkpoint_does_not_start_anew(config):
    train(dataclasses.replace(config, steps=2))
    os.truncate(config.out / "checkpoints" / "step-00000002" / "state.json", 3)
    for read in (lambda: train(config, resume=True), lambda: load_model(config.out)):
        with pytest.raises(ValueError, match=r"no checkpoint is whole.*state\.json"):
            read()


# ---- the step ----------------------------------------------------------------------------------


def test_accumulation_changes_memory_not_the_gradient(config):
    # The same windows in one micro-batch or four: the sums differ in order only.
    losses = {}
    for batch_size in (1, 4):
        t = Trainer(dataclasses.replace(config, precision="fp32", batch_size=batch_size))
        assert t.config.accumulation == 4 // batch_size
        losses[batch_size] = [t.train_step().loss for _ in range(5)]
    assert losses[1] == pytest.approx(losses[4], rel=1e-5)


def test_loss_is_divided_by_valid_tokens_of_the_whole_step(config, monkeypatch):
    # Micro-batch 1 has one valid target, micro-batch 2 all: each target must weigh the same.
    t = Trainer(dataclasses.replace(config, precision="fp32"))
    batches = [t.sampler.batch(2), t.sampler.batch(2)]
    batches[0][1].view(-1)[1:] = -100
    idx, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = t.model(idx, targets, backend="reference").item()  # the mean over valid targets
    pending = iter(batches)
    monkeypatch.setattr(t.sampler, "batch", lambda size: next(pending))
    assert t.train_step().loss == pytest.approx(expected, rel=1e-6)


def test_reference_and_kernels_agree_for_50_steps(config):
    """The same recipe on both paths: 50 losses, each within 1e-5 of the other's.

    Both compute in fp32 and differ in the order of sums alone. A loss near 3.5 is stored to 2.4e-7,
    and that is how much the paths were seen to differ, up to 5e-7, as the learning rate is too low
    for training to amplify it. The bound leaves a factor of twenty for other processors.
    """
    paths = {}
    for backend in (None, "reference"):
        adamw = dataclasses.replace(
            config, precision="fp32", backend=backend, optimizer="adamw", lr=1e-3, steps=50,
            warmup_steps=10,
        )  # fmt: skip
        t = Trainer(adamw)
        paths[backend] = [t.train_step().loss for _ in range(50)]
    assert paths[None] == pytest.approx(paths["reference"], abs=1e-5)
    assert paths[None][-1] < paths[None][0] - 0.3  # it trained


def test_training_learns_the_text(config):
    t = Trainer(dataclasses.replace(config, steps=40, warmup_steps=5))
    losses = [t.train_step().loss for _ in range(40)]
    assert losses[0] == pytest.approx(math.log(t.config.model.vocab_size), abs=0.3)
    assert losses[-1] < 2.0
    assert t.evaluate(None) < 2.1


def test_evaluation_and_samples_draw_no_random_numbers(config):
    t = Trainer(dataclasses.replace(config, model=GPT2))
    t.train_step()
    state = torch.get_rng_state()
    assert t.evaluate(4) == t.evaluate(4)
    assert t.sample() == t.sample()
    assert torch.equal(torch.get_rng_state(), state)
    assert t.model.training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sixteen_bits_train_close_to_fp32(config, optimizer):
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        t = Trainer(dataclasses.replace(config, precision=precision, optimizer=optimizer))
        losses[precision] = [t.train_step().loss for _ in range(8)]
        assert all(p.dtype == torch.float32 for p in t.model.parameters())
    # bf16 has 8 bits, 2⁻⁸ = 0.4 % a rounding, fp16 11; a mean over 128 tokens errs less.
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2**-6)
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=2**-9)
    assert len({tuple(steps) for steps in losses.values()}) == 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_step_that_overflows_fp16_changes_nothing_but_the_scale(config, optimizer):
    t = Trainer(dataclasses.replace(config, precision="fp16", optimizer=optimizer))
    t.train_step()
    before, scale = copy.deepcopy(t.model.state_dict()), t.scaler.get_scale()
    t.scaler.update(2.0**60)
    assert not math.isfinite(t.train_step().grad_norm)
    assert all(torch.equal(before[name], p) for name, p in t.model.state_dict().items())
    assert t.scaler.get_scale() == 2.0**59
    t.scaler.update(scale)
    assert math.isfinite(t.train_step().grad_norm)


def test_resumed_run_keeps_its_gradient_scale(config):
    config = dataclasses.replace(config, precision="fp16")
    t = train(config)
    t.scaler.update(1024.0)
    t.save(config.out / "checkpoints")
    again = Trainer(config)
    again.load(config.out / "checkpoints")
    assert again.scaler.get_scale() == 1024.0


def test_loss_that_is_no_number_stops_the_run(config, monkeypatch):
    t = Trainer(config)
    with torch.no_grad():
        t.model.wte.weight.fill_(math.nan)
    before = {name: p.clone() for name, p in t.model.named_parameters()}
    with pytest.raises(FloatingPointError, match="nan in step 1"):
        t.train_step()
    assert t.step == 0
    for name, p in t.model.named_parameters():
        assert torch.equal(p.isnan(), before[name].isnan())  # no update was made


def test_clipping_is_reported_before_it_acts(config):
    t = Trainer(dataclasses.replace(config, clip=1e-6))
    assert t.train_step().grad_norm > 1e-3


# ---- schedule and length -----------------------------------------------------------------------


def test_schedules_rise_and_fall(config):
    wsd = dataclasses.replace(config, steps=100, warmup_steps=10, decay=0.5, final_lr=0.0)
    factors = [lr_factor(wsd, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert set(factors[10:50]) == {1.0}
    assert factors[75] == pytest.approx(0.5) and 0 < factors[99] < 0.03
    cosine = dataclasses.replace(wsd, schedule="cosine", final_lr=0.1)
    factors = [lr_factor(cosine, step) for step in range(100)]
    assert factors[55] == pytest.approx(0.55)
    assert factors[10] == 1.0 and 0.1 < factors[99] < 0.11


def test_schedule_of_a_run_shorter_than_its_warmup(config):
    for name in ("wsd", "cosine"):
        short = dataclasses.replace(config, schedule=name, steps=3, warmup_steps=100)
        assert [lr_factor(short, step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_time_limit_is_kept_and_resumable(config):
    limited = dataclasses.replace(config, steps=10**6, max_minutes=0.03, eval_every=0)
    begin = time.perf_counter()
    t = train(limited)
    assert time.perf_counter() - begin < 60  # it would be hours, but the machine may be busy
    assert t.step == t.pace.steps < 10**6
    assert events(config.out, "pace")[-1]["steps"] == t.step
    assert train(trainer.read_config(config.out), resume=True).step == t.step


def test_a_run_with_a_time_limit_is_resumed_bit_for_bit_as_it_was_decided(config, monkeypatch):
    """By what was measured before the stop, whatever time the steps after it take."""
    monkeypatch.setattr(pace.TimeLimit, "left", lambda self, seconds: 9 if seconds else None)
    config = dataclasses.replace(config, steps=100, max_minutes=1.0)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        assert train(config).pace.steps == 5 + 9
    ends = []
    for copy_of in (config.out.with_name("a"), config.out.with_name("b")):
        shutil.copytree(config.out, copy_of)
        ends.append(train(trainer.read_config(copy_of), resume=True))
        assert ends[-1].step == 14 and not events(copy_of, "pace")[5:]
        rates = [line["lr"] for line in events(copy_of, "step")]
        assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.25 * config.lr
    first, second = map(tensors_of, ends)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_a_run_stopped_before_it_was_timed_is_timed_when_resumed(config):
    config = dataclasses.replace(config, steps=10**6, max_minutes=10.0)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        t = train(config)
    assert trainer.time_limit(t, 0.0) is not None
    for left in (7, 10**6 - 2):  # some steps, or all there are
        t.pace.retime(2, left, float)
        assert trainer.time_limit(t, 0.0) is None
        t.pace = Pace(10**6, 10**6, position=2.0)


# ---- what a run leaves behind ------------------------------------------------------------------


def test_run_folder(config, capsys):
    train(dataclasses.replace(config, checkpoint_every=2, keep_checkpoints=2, plot=True))
    names = {path.name for path in config.out.iterdir()}
    assert {"config.json", "tokenizer.json", "log.jsonl", "checkpoints", "loss.png"} <= names
    steps = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert steps == ["step-00000006", "step-00000008"]
    first = read_log(config.out)[0]
    assert first.pop("event") == "config"
    assert first == json.loads((config.out / "config.json").read_text())
    assert [line["step"] for line in events(config.out, "eval")] == [3, 6, 8]
    assert [line["tokens"] for line in events(config.out, "step")] == [128 * i for i in range(1, 9)]

    out = capsys.readouterr().out
    assert "2 windows of 32 tokens × 2 accumulated" in out
    assert "= 128 tokens a step" in out
    assert "reference  chosen (asked for)" in out
    assert "6 N + 12·L·C·T" in out
    assert "loss.png" in out


def test_trained_model_is_loaded_with_its_tokenizer(config):
    t = train(config)
    model, tokenizer = load_model(config.out)
    assert tokenizer == t.tokenizer
    assert not model.training
    for name, tensor in t.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_exported_model_is_loaded_alike(config, tmp_path):
    t = train(config)
    t.model.save_pretrained(str(tmp_path / "hf"))
    t.tokenizer.save(tmp_path / "hf")
    model, tokenizer = load_model(tmp_path / "hf")
    assert tokenizer == t.tokenizer
    idx = torch.tensor([t.tokenizer.encode("To be")])
    assert torch.equal(model(idx, backend="reference"), t.model.eval()(idx, backend="reference"))


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run in"):
        trainer.read_config(tmp_path)


def test_vocabulary_is_the_tokenizers(config):
    assert Trainer(config).model.config.vocab_size == len(
        set("To be, or not to be, that is the question:\nWhether 'tis nobler.\n")
    )
    with pytest.raises(ValueError, match="vocab_size is the tokenizer's"):
        Trainer(dataclasses.replace(config, model=dataclasses.replace(MODERN, vocab_size=100)))


# ---- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) == before


def test_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == before
