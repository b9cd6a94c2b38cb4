"""Trains a GPT on a prepared dataset.

    fastattn prepare shakespeare
    fastattn train --preset demo --out runs/first
    fastattn train --resume runs/first

The run folder:

    config.json       the configuration, all of it resolved
    tokenizer.json    the dataset's
    log.jsonl         a line a step and evaluation (report.py)
    checkpoints/      weights, optimizer, random states, data position (checkpoint.py)
    loss.png          the curve, drawn at the end
    tensorboard/      with --tensorboard

A run that is stopped (Ctrl-C) and resumed computes on the CPU, bit for bit, what it would have
computed without the stop; with --max-minutes, in the number of steps that was decided by then.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checkpoint, optim, report
from .config import TrainConfig, merge, to_dict
from .data import TokenDataset
from .files import read_json, write_json
from .flops import device_peak
from .gpt import GPT, GPTConfig
from .pace import Pace, TimeLimit
from .precision import DTYPES, Precision, autocast, fastest, gradient_scaler
from .sampler import Batch, WindowSampler, check_length, eval_batches
from .tokenizer import BPETokenizer, Tokenizer

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
IGNORED = -100  # the target that counts for nothing
EVAL_BATCH_TOKENS = 8192  # at a time at least: without gradients they take little memory


class StepResult(NamedTuple):
    loss: float  # nats a token
    grad_norm: float  # before clipping; not finite where fp16 overflowed
    lr: float  # AdamW's
    seconds: float


class Trainer:
    """A model in training: one optimizer step at a time, evaluation, saving and loading.

    Builds everything from the config, whose seed also becomes torch's.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = c = resolve(config)
        self.device = torch.device(c.device)
        self.train_data, self.val_data = (TokenDataset(c.data, s) for s in ("train", "val"))
        self.tokenizer = self.train_data.tokenizer
        torch.manual_seed(c.seed)
        self.model = GPT(c.model).to(self.device)
        self.optimizer = make_optimizer(self.model, c)
        self.sampler = WindowSampler(self.train_data.tokens, c.T, seed=c.seed)
        assert c.precision != "auto"
        self.precision: Precision = c.precision
        self.scaler = gradient_scaler(self.precision, self.device)
        self.step = 0  # steps taken
        self.pace = Pace(c.steps, c.steps)

    @property
    def tokens_per_step(self) -> int:
        c = self.config
        return c.accumulation * c.batch_size * c.T

    @property
    def flops_per_step(self) -> int:
        return self.tokens_per_step * self.model.flops_per_token(self.config.T)

    @property
    def eval_batch_size(self) -> int:
        return max(self.config.batch_size, EVAL_BATCH_TOKENS // self.config.T)

    def train_step(self) -> StepResult:
        """One optimizer step. Raises FloatingPointError if the loss is not finite."""
        c, begin = self.config, time.perf_counter()
        batches = [self._to_device(self.sampler.batch(c.batch_size)) for _ in range(c.accumulation)]
        valid = sum(count_valid(targets) for _, targets in batches)
        self.model.train()
        loss = 0.0
        for idx, targets in batches:
            # Each token weighs the same in the step. In a mean of the micro-batches' means it would
            # weigh more, the more of its neighbours are ignored.
            with self._autocast():
                part = self.model(idx, targets, reduction="sum", backend=c.backend) / valid
            self.scaler.scale(part).backward()
            loss += part.item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} in step {self.step + 1}")
        self.scaler.unscale_(self.optimizer)
        grad_norm = optim.clip_grad_norm(self.model.parameters(), c.clip).item()
        factor = lr_factor(c, self.pace.position)
        optim.set_lr(self.optimizer, factor)
        self.scaler.step(self.optimizer)  # changes nothing where a gradient overflowed fp16
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.pace.advance()
        return StepResult(loss, grad_norm, factor * c.lr, time.perf_counter() - begin)

    def evaluate(self, windows: int | None) -> float:
        """Validation loss in nats a token, over so many fixed windows or, with None, over all."""
        c = self.config
        batches = eval_batches(self.val_data.tokens, c.T, self.eval_batch_size, windows)
        with self._autocast():
            return mean_loss(self.model, map(self._to_device, batches), backend=c.backend)

    def sample(self) -> str:
        """What the model makes of the prompt; the same random draws each time."""
        c = self.config
        prompt = torch.tensor([self.tokenizer.encode(c.sample_prompt)], device=self.device)
        with self._autocast():
            tokens = self.model.generate(
                prompt, max_new_tokens=c.sample_tokens, seed=c.seed, backend=c.backend
            )
        return self.tokenizer.decode(tokens[0])

    def save(self, folder: Path) -> None:
        """A checkpoint of this step into `folder`; the oldest beyond keep_checkpoints go."""
        state = {
            "sampler": self.sampler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "data_sha256": self.train_data.sha256,
        }
        if self.config.max_minutes is not None:
            state["pace"] = self.pace.state_dict()
        checkpoint.save(
            *(folder, self.step, self.model, self.optimizer, state),
            keep_last=self.config.keep_checkpoints,
        )

    def load(self, folder: Path) -> None:
        """Go back to the newest checkpoint in `folder`, or stay at step 0 if there is none yet.

        Raises ValueError if it is of another model, optimizer or dataset, or if all are damaged.
        """
        newest = checkpoint.latest(folder)
        if newest is None:
            return
        saved = checkpoint.load(newest)
        if saved.state["data_sha256"] != self.train_data.sha256:
            raise ValueError(
                f"{newest} was trained on other data than {self.train_data.path} holds"
            )
        self.sampler.load_state_dict(saved.state["sampler"])
        if scaler := saved.state.get("scaler"):  # there is none but in fp16
            self.scaler.load_state_dict(scaler)
        saved.restore(self.model, self.optimizer)  # and torch's generators
        self.step = saved.step
        untimed = {"steps": self.config.steps, "position": float(self.step)}
        self.pace = Pace(self.config.steps, **saved.state.get("pace", untimed))

    def _to_device(self, batch: Batch) -> Batch:
        return batch[0].to(self.device), batch[1].to(self.device)

    def _autocast(self) -> torch.autocast:
        return autocast(self.precision, self.device)


def mean_loss(model: GPT, batches: Iterable[Batch], *, backend: str | None = None) -> float:
    """The mean loss over all valid targets of `batches`, in nats a token, without dropout."""
    was_training = model.training
    model.eval()
    total, valid = 0.0, 0
    with torch.no_grad():
        for idx, targets in batches:
            total += model(idx, targets, reduction="sum", backend=backend).item()
            valid += count_valid(targets)
    model.train(was_training)
    return total / valid


def count_valid(targets: Tensor) -> int:
    return int((targets != IGNORED).sum())


# ---- what follows from the config --------------------------------------------------------------


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with what the machine and the dataset decide filled in: every "auto" and None.

    Raises ValueError or FileNotFoundError for a dataset, device or backend that can't be used.
    """
    data, val_data = (TokenDataset(config.data, split) for split in ("train", "val"))
    for split in (data, val_data):
        check_length(len(split), config.T, str(split.path))
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} can't be used: torch {torch.__version__} finds no GPU")
    name = backends.requested(config.backend)
    if name is not None and (reason := backends.row(name).unusable()) is not None:
        raise ValueError(f"backend {name} can't be used here: {reason}")
    precision = config.precision
    if precision == "auto":
        precision = fastest(torch.device(device))
    if config.model.vocab_size not in (GPTConfig().vocab_size, data.vocab_size):
        raise ValueError(
            f"model.vocab_size is the tokenizer's {data.vocab_size}, got {config.model.vocab_size}"
        )
    architecture = dataclasses.replace(
        config.model, vocab_size=data.vocab_size, eos_token_id=data.tokenizer.eot
    )
    return dataclasses.replace(
        config,
        data=config.data.resolve(),
        model=architecture,
        seq_len=config.T,
        tokens_per_step=config.accumulation * config.batch_size * config.T,
        device=device,
        precision=precision,
    )


def make_optimizer(model: GPT, c: TrainConfig) -> torch.optim.Optimizer:
    betas = (c.beta1, c.beta2)
    if c.optimizer == "adamw":
        return optim.adamw(model, c.lr, betas=betas, weight_decay=c.weight_decay)
    return optim.muon(
        model,
        c.muon_lr,
        adamw_lr=c.lr,
        momentum=c.muon_momentum,
        betas=betas,
        weight_decay=c.weight_decay,
    )


def lr_factor(c: TrainConfig, step: float) -> float:
    """The learning rate at this position of the schedule, as a share of the peak.

    Without a time limit the position is the number of steps taken before.
    """
    total, warmup = c.steps, min(c.warmup_steps, c.steps)
    if c.schedule == "cosine":
        return optim.warmup_cosine(step, warmup=warmup, total=total, floor=c.final_lr)
    decay = min(round(c.decay * total), total - warmup)
    return optim.warmup_stable_decay(
        step, warmup=warmup, total=total, decay=decay, floor=c.final_lr
    )


def time_limit(t: Trainer, begin: float) -> TimeLimit | None:
    """Of a run that has one and was not timed before; what was decided stays when it is resumed."""
    c = t.config
    if c.max_minutes is None or t.pace.timed:
        return None
    tokens = c.eval_windows * c.T if c.eval_windows else len(t.val_data)
    share = tokens / t.tokens_per_step
    return TimeLimit(60 * c.max_minutes, begin, evaluation=share, every=c.eval_every)


# ---- the run -----------------------------------------------------------------------------------


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Trainer:
    """Train as `config` says, or go on with the run in config.out; returns the Trainer at the end.

    Raises FileExistsError if config.out holds a run and neither `resume` nor `overwrite` is given,
    and FloatingPointError if the loss stops being a number; checkpoints before that stay.
    """
    begin = time.perf_counter()
    if not resume:
        check_folder(config.out, overwrite)
    t = Trainer(config)  # what can't be run is told before a run is removed
    c, folder = t.config, config.out
    if resume:
        t.load(folder / CHECKPOINTS)
    else:
        clear_folder(folder)
    write_json(folder / CONFIG, to_dict(c))
    t.tokenizer.save(folder)

    peak = device_peak(t.device, DTYPES[t.precision])
    print(report.describe(t, peak), flush=True)
    log = report.RunLog(folder, step=t.step, tensorboard=c.tensorboard)
    if t.step == 0:
        log.write("config", **to_dict(c))
    log.write("start", step=t.step, torch=torch.__version__, threads=torch.get_num_threads())
    bar = report.Progress(t.pace.steps, t.tokens_per_step, t.flops_per_step, peak, step=t.step)

    saved_step, limit = t.step, time_limit(t, begin)
    with StopSignals() as stop, bar, log:
        while t.step < t.pace.steps and not stop.requested:
            result = t.train_step()
            if limit is not None and (left := limit.left(result.seconds)) is not None:
                t.pace.retime(t.step, min(left, c.steps - t.step), partial(lr_factor, c))
                log.write("pace", step=t.step, steps=t.pace.steps)
                bar.resize(t.pace.steps)
            tokens = t.step * t.tokens_per_step
            log.write("step", step=t.step, tokens=tokens, **result._asdict())
            bar.update(t.step, result.loss, result.seconds)
            if due(t.step, c.eval_every) or t.step == t.pace.steps:
                val_loss = t.evaluate(c.eval_windows)
                log.write("eval", step=t.step, val_loss=val_loss)
                bar.print(f"step {t.step}: validation loss {val_loss:.4f}")
            if due(t.step, c.sample_every):
                log.write("sample", step=t.step, text=(text := t.sample()))
                bar.print(text)
            if due(t.step, c.checkpoint_every):
                t.save(folder / CHECKPOINTS)
                saved_step = t.step
        if saved_step != t.step:
            t.save(folder / CHECKPOINTS)

    plot = report.plot_losses(folder) if c.plot else None
    print(closing_words(t, time.perf_counter() - begin, plot), flush=True)
    return t


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def check_folder(folder: Path, overwrite: bool) -> None:
    """FileExistsError if there is a run in `folder`, unless it may be replaced."""
    if not overwrite and ((folder / CONFIG).exists() or (folder / CHECKPOINTS).exists()):
        raise FileExistsError(
            f"{folder} holds a run: go on with it (fastattn train --resume {folder}), choose "
            "another --out, or replace it with --overwrite"
        )


def clear_folder(folder: Path) -> None:
    """Make the folder if there is none, and remove the run that is in it, but no other files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, report.LOG, report.PLOT):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, report.TENSORBOARD):
        shutil.rmtree(folder / name, ignore_errors=True)


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in `folder`."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"no run in {folder}: {CONFIG} is missing")
    config = merge(TrainConfig(), read_json(path), str(path))
    return dataclasses.replace(config, out=folder)  # it may have been moved


def is_run(folder: Path) -> bool:
    return (folder / CHECKPOINTS).is_dir()


def load_model(folder: Path) -> tuple[GPT, Tokenizer]:
    """The newest model of a run, or one in Hugging Face's GPT-2 layout, in eval mode.

    A folder without a tokenizer of ours is read with GPT-2's, if its vocabulary is GPT-2's.
    """
    if is_run(folder):
        newest = checkpoint.latest(folder / CHECKPOINTS)
        if newest is None:
            raise FileNotFoundError(f"the run {folder} has no checkpoint yet")
        model = GPT(read_config(folder).model).eval()
        model.load_state_dict(checkpoint.load(newest).model)
        return model, Tokenizer.load(folder)
    model = GPT.from_pretrained(str(folder))
    try:
        return model, Tokenizer.load(folder)
    except (FileNotFoundError, ValueError):
        if model.config.vocab_size != BPETokenizer.vocab_size:
            raise
        return model, BPETokenizer()


def closing_words(t: Trainer, seconds: float, plot: Path | None) -> str:
    c, steps = t.config, t.pace.steps
    if t.step < steps:
        return (
            f"stopped after step {t.step} of {steps}; go on with: fastattn train --resume {c.out}"
        )
    lines = [f"trained {t.step} steps in {report.clock(seconds)}: {c.out}"]
    if plot is not None:
        lines.append(f"loss curve: {plot}")
    lines.append(f"sample it: fastattn generate {c.out}")
    return "\n".join(lines)


class StopSignals:
    """Inside, a first Ctrl-C or SIGTERM is noted in `requested`; a second Ctrl-C interrupts."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # os.write, since print is not reentrant and may be what the signal came into
        os.write(2, b"\nstopping after this step, with a checkpoint (Ctrl-C again: at once)\n")

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
            self._before = [(s, signal.signal(s, self._note)) for s in self.SIGNALS]
        else:
            self._before = []
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)
