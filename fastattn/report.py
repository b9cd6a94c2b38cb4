"""What a training run shows and keeps: progress on the terminal, log.jsonl, TensorBoard, loss.png.

log.jsonl has one JSON object a line. "event" says what it is:

    config      once, first: the resolved configuration
    start       each time a process begins or resumes the run: step, versions, threads
    step        step, tokens (so far), loss (nats a token), grad_norm, lr (AdamW's), seconds
    eval        step, val_loss
    sample      step, text
    pace        with a time limit: step, steps (the whole run's, as they seem to fit)

Floats are written so that reading them gives the same bits.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import precision
from .attention import explain
from .files import replacing
from .flops import Peak

if TYPE_CHECKING:
    from .trainer import Trainer

LOG = "log.jsonl"
PLOT = "loss.png"
TENSORBOARD = "tensorboard"


class RunLog:
    """The run's log.jsonl, and its TensorBoard events if wanted; each line is flushed as it comes.

    A run resumed at `step` forgets what the log holds beyond it: those steps come again.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, step: int = 0, tensorboard: bool = False
    ) -> None:
        self.path = Path(folder) / LOG
        _truncate(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self._board = _summary_writer(self.path.parent / TENSORBOARD, step) if tensorboard else None

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None and event in ("step", "eval"):
            step = fields["step"]
            for name, value in fields.items():
                if name != "step":
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's log, without one cut off by a crash."""
    lines = []
    for line in (Path(folder) / LOG).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # only the last line can be torn: every other was flushed whole
            break
    return lines


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`; at step 0 none."""
    if not path.exists():
        return
    kept = [line for line in read_log(path.parent) if line.get("step", 0) <= step] if step else []
    with replacing(path) as file:
        for line in kept:
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "--tensorboard needs tensorboard: pip install 'fastattn[train]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


# ---- the start ---------------------------------------------------------------------------------


def describe(t: Trainer, peak: Peak | None) -> str:
    """What will be trained, how, and why so: the lines printed at the start."""
    c, m = t.config, t.config.model
    heads = f"{m.n_head} heads" + (f" on {m.kv_heads}" if m.kv_heads != m.n_head else "")
    traits = [m.position, m.norm, m.mlp] + [n for n in ("bias", "qk_norm") if getattr(m, n)]
    size, size_in_products = (si(t.model.num_params(embeddings=e)) for e in (True, False))
    flops = si(t.model.flops_per_token(c.T))
    muon = f"Muon at {c.muon_lr:g} on the blocks' matrices, else " if c.optimizer == "muon" else ""
    fall = f"linearly over the last {c.decay:.0%}" if c.schedule == "wsd" else "along a cosine"
    limit = f", no more than fit in {c.max_minutes:g} minutes" if c.max_minutes else ""
    epochs = t.pace.steps * t.tokens_per_step / len(t.train_data)
    no_peak = "n/a: this GPU's peak is not in our table, or this CPU was too busy to measure its"
    rows = (
        ("model", f"{size} parameters: {m.n_layer} layers of width {m.n_embd}, {heads}"),
        ("", ", ".join(traits)),
        ("data", f"{c.data}: {m.vocab_size} in the {t.tokenizer.kind} vocabulary"),
        ("", f"{len(t.train_data):,} tokens for training, {len(t.val_data):,} for validation"),
        ("batch", f"{c.batch_size} windows of {c.T} tokens × {c.accumulation} accumulated"),
        ("", f"= {t.tokens_per_step:,} tokens a step"),
        ("optimizer", f"{muon}AdamW at {c.lr:g}"),
        ("schedule", f"{c.warmup_steps} steps up, then {fall} down to {c.final_lr:g} of the peak"),
        ("length", f"{t.pace.steps:,} steps = {epochs:.2f} epochs{limit}"),
        ("precision", precision.note(t.precision, t.device)),
        *(("" if i else "backend", line) for i, line in enumerate(attention_choice(t))),
        ("FLOPs", f"{flops} a token = 6 N + 12·L·C·T, N = {size_in_products}, T = {c.T}"),
        ("MFU", f"FLOPs a second over {si(peak.flops)}: {peak.source}" if peak else no_peak),
        ("run", str(c.out)),
    )
    return "\n".join(f"{label:<11}{text}" for label, text in rows)


def attention_choice(t: Trainer) -> list[str]:
    """`explain` of the attention in a training step, a line a backend."""
    c, m = t.config, t.config.model
    dtype = precision.DTYPES[t.precision]
    q = torch.empty(c.batch_size, c.T, m.n_head, m.head_dim, dtype=dtype, device=t.device)
    k = torch.empty(c.batch_size, c.T, m.kv_heads, m.head_dim, dtype=dtype, device=t.device)
    verdicts = explain(
        *(q, k, k),
        causal=True,
        window=(m.window, 0),
        softcap=m.attn_softcap,
        dropout_p=m.dropout,
        backend=c.backend,
    )
    return str(verdicts).splitlines()


# ---- terminal ----------------------------------------------------------------------------------


class Meter:
    """A mean over about the last 30 values, from the first one on."""

    DECAY = 1 - 1 / 30

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> None:
        self._sum = self.DECAY * self._sum + value
        self._weight = self.DECAY * self._weight + 1

    @property
    def mean(self) -> float:
        return self._sum / self._weight if self._weight else math.nan


class Progress:
    """A progress bar on a terminal; elsewhere, as in CI logs, a line about every ten seconds."""

    PLAIN_SECONDS = 10.0

    def __init__(
        self,
        total: int,
        tokens_per_step: int,
        flops_per_step: int,
        peak: Peak | None,
        *,
        step: int = 0,
    ) -> None:
        self.total, self.tokens, self.flops, self.peak = (
            total,
            tokens_per_step,
            flops_per_step,
            peak,
        )
        self._seconds, self._loss = Meter(), Meter()
        self._bar, self._task = _rich_bar(total, step)
        self._printed = 0.0  # when the last plain line was

    def update(self, step: int, loss: float, seconds: float) -> None:
        """After a step that took `seconds`."""
        self._seconds.add(seconds)
        self._loss.add(loss)
        status = f"loss {self._loss.mean:.4f}  {self._rates()}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif time.monotonic() - self._printed > self.PLAIN_SECONDS or step == self.total:
            self._printed = time.monotonic()
            left = clock((self.total - step) * self._seconds.mean)
            print(f"step {step}/{self.total}  {status}  {left} left", flush=True)

    def resize(self, total: int) -> None:
        """The run takes so many steps in all."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def _rates(self) -> str:
        seconds = self._seconds.mean
        mfu = f"{self.flops / seconds / self.peak.flops:.1%}" if self.peak else "n/a"
        return f"{si(self.tokens / seconds)} tokens/s  MFU {mfu}"

    def print(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _rich_bar(total: int, step: int) -> tuple[Any, Any]:
    """A bar and its task, or (None, None) where there is no terminal or no rich."""
    if not sys.stdout.isatty():
        return None, None
    try:
        from rich import progress
    except ImportError:
        return None, None
    bar = progress.Progress(
        progress.BarColumn(bar_width=24),
        progress.TextColumn("{task.completed}/{task.total}"),
        progress.TextColumn("{task.fields[status]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("<"),
        progress.TimeRemainingColumn(compact=True),
    )
    return bar, bar.add_task("train", total=total, completed=step, status="")


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def si(value: float) -> str:
    """12345.6 -> "12.3k": three digits and a unit."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or unit == "T":
            break
        value /= 1000
    return f"{value:.3g}{unit}"


# ---- plot --------------------------------------------------------------------------------------


def plot_losses(folder: str | os.PathLike[str]) -> Path | None:
    """Draws the log's training and validation loss into loss.png; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read_log(folder)
    steps = [line for line in lines if line["event"] == "step"]
    evals = [line for line in lines if line["event"] == "eval"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    x = [line["step"] for line in steps]
    loss = [line["loss"] for line in steps]
    axes.plot(x, loss, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(x, _smoothed(loss), color="C0", label="training loss, smoothed")
    if evals:
        final = evals[-1]["val_loss"]
        label = f"validation loss, last {final:.3f}"
        xy = [[line["step"], line["val_loss"]] for line in evals]
        axes.plot(*zip(*xy, strict=True), "o-", color="C1", markersize=4, label=label)
    axes.set(xlabel="step", ylabel="nats per token", title=Path(folder).name)
    if loss:  # the first steps' fall would flatten all the rest
        shown = loss[len(loss) // 20 :] + [line["val_loss"] for line in evals]
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.05 * (high - low + 0.1), high + 0.05 * (high - low + 0.1))
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(folder) / PLOT
    figure.savefig(path, dpi=120)
    return path


def _smoothed(values: list[float]) -> list[float]:
    meter, smooth = Meter(), []
    for value in values:
        meter.add(value)
        smooth.append(meter.mean)
    return smooth
