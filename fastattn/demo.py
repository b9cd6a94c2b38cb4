"""`fastattn demo`: what the package does, from a check of the kernels to text that it wrote."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, info, proof, report, trainer
from .attention import attention, explain
from .data import prepare
from .memory import peak_memory
from .presets import PRESETS
from .trainer import StepResult, Trainer

PROMPT = "ROMEO:\n"


def demo(out: Path, minutes: float) -> None:
    """Run every part, printing as it goes. The trained run stays in `out`."""
    heading("This machine")
    print(info.report())

    config = dataclasses.replace(PRESETS["demo"], out=out, max_minutes=minutes)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not proof.all_proved("cuda", device):
        heading("Proving the kernels on this GPU")
        proof.prove(device, ["cuda"])  # Triton would compile for longer than the training takes

    heading("Our attention against float64")
    print(check_attention(device))

    heading("Training")
    prepare("shakespeare", "char", config.data)
    trained = trainer.train(config, overwrite=True)
    loss = trained.evaluate(None)
    print(f"validation loss over all {len(trained.val_data):,} tokens: {loss:.4f} nats a character")

    heading("Ours against the reference path")
    print(compare_paths(trained))

    heading("A sample")
    print(sample(trained))

    heading("Where things are")
    print(f"loss curve  {out / report.PLOT}")
    print(f"log         {out / report.LOG}")
    print(f"checkpoint  {checkpoint.latest(out / trainer.CHECKPOINTS)}")
    print(f"more text   fastattn generate {out} --prompt 'JULIET:'")


def heading(title: str) -> None:
    print(f"\n=== {title} " + "=" * max(0, 76 - len(title)) + "\n", flush=True)


# ---- check -------------------------------------------------------------------------------------


def check_attention(device: torch.device) -> str:
    """Output and gradients in fp32 on the chosen backend and in eager PyTorch, against fp64."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 257, 4, 64)  # (B, S, H, D)
    q, k, v, dout = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    exact = outputs(q.double(), k.double(), v.double(), dout.double(), "reference")
    lines = [
        "q, k, v of (B, S, H, D) = (2, 257, 4, 64), causal, fp32. fastattn.explain(q, k, v):",
        *(f"  {line}" for line in str(explain(q, k, v, causal=True)).splitlines()),
        "",
        f"{'largest error':<20}" + "".join(f"{name:>11}" for name in ("out", "dq", "dk", "dv")),
    ]
    for name, backend in (("fastattn", None), ("eager PyTorch", "reference")):
        ours = outputs(q, k, v, dout, backend)
        errors = [(a.double() - b).abs().max().item() for a, b in zip(ours, exact, strict=True)]
        lines.append(f"{name:<20}" + "".join(f"{error:>11.1e}" for error in errors))
    return "\n".join(lines)


def outputs(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, backend: str | None
) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of causal attention."""
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = attention(q, k, v, causal=True, backend=backend)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


# ---- compare -----------------------------------------------------------------------------------

PATHS = {"fastattn": None, "reference": "reference"}
LONG = 2048  # tokens of one long window


def compare_paths(trained: Trainer, steps: int = 5) -> str:
    """Training steps from the same weights, on the same batches, by both paths in turn."""
    c = trained.config
    long = dataclasses.replace(
        c,
        model=dataclasses.replace(c.model, block_size=LONG),
        seq_len=LONG,
        batch_size=1,
        tokens_per_step=LONG,
    )
    lines = [f"{'':<24}{'time a step':>14}{'peak memory':>14}   {'loss, first and last step':>26}"]
    for config in (c, long):
        lines.append(f"{config.batch_size} × {config.T} tokens")
        trainers = {}
        for path, backend in PATHS.items():
            trainers[path] = Trainer(dataclasses.replace(config, backend=backend))
            trainers[path].model.load_state_dict(trained.model.state_dict())
        results: dict[str, list[StepResult]] = {path: [] for path in PATHS}
        for _ in range(steps):
            for path, t in trainers.items():
                results[path].append(t.train_step())
        for path, t in trainers.items():
            milliseconds = 1e3 * statistics.median(r.seconds for r in results[path][1:])
            peak = peak_memory(t.train_step)
            memory = "n/a" if peak is None else f"{peak / 2**20:.0f} MiB"
            first, last = results[path][0].loss, results[path][-1].loss
            lines.append(
                f"  {path:<22}{milliseconds:>11.1f} ms{memory:>14}   {first:>13.6f}{last:>13.6f}"
            )
    lines += ["", f"time: median of {steps - 1} steps taken in turn; memory: beyond what was held"]
    return "\n".join(lines)


# ---- sample ------------------------------------------------------------------------------------


def sample(t: Trainer) -> str:
    prompt = torch.tensor([t.tokenizer.encode(PROMPT)])
    tokens = t.model.generate(prompt, max_new_tokens=500, temperature=0.8, seed=7)
    return t.tokenizer.decode(tokens[0])
