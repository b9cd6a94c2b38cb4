"""A training step of GPT-2 small's shape, ours against PyTorch's own: `python -m
benchmarks.bench_train [--quick]`.

One model, one optimizer, two ways to compute attention and loss: fastattn's kernels, or torch's
scaled_dot_product_attention and F.cross_entropy on whole logits. Steps alternate; a step is
forward, backward, clipping and AdamW in fp32. Peak memory is that of the process above weights,
gradients and optimizer state, each way in a process of its own. Needs fastattn[bench,train].
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.gpt import GPT, GPTConfig

from .harness import RESULTS, Ceilings, Competitor, interleave, machine, write_json


def torch_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """fastattn.attention's call in CausalSelfAttention, through torch's SDPA."""
    assert options["causal"] and not options["softcap"] and not options["dropout_p"]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(
        1, 2
    )


def torch_linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, **options) -> Tensor:
    assert not options["softcap"]
    return F.cross_entropy(F.linear(x, weight).flatten(0, -2), target.flatten())


@contextlib.contextmanager
def torch_path():
    """While open, models attend and compute their loss with torch's functions."""
    with (
        mock.patch("fastattn.modules.attention", torch_attention),
        mock.patch("fastattn.gpt.linear_cross_entropy", torch_linear_cross_entropy),
    ):
        yield


PATHS = {"ours": contextlib.nullcontext, "torch": torch_path}


class Trainee:
    """A GPT of GPT-2 small's shape (or a small one), a batch, an optimizer."""

    def __init__(self, quick: bool):
        small = {"n_layer": 2, "n_embd": 256, "n_head": 4} if quick else {}
        self.config = GPTConfig(**small)
        self.seqlen = 256 if quick else 1024
        self.model = GPT(self.config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.idx = torch.randint(self.config.vocab_size, (1, self.seqlen + 1))

    def step(self) -> float:
        loss = self.model(self.idx[:, :-1], self.idx[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state_bytes(self) -> int:
        """Weights, gradients and both of AdamW's moments."""
        return 4 * sum(p.nbytes for p in self.model.parameters())


def peak_bytes(path: str, quick: bool) -> int:
    """Peak resident memory of training steps in this process, above its state and all before."""

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    torch.randn(512, 512) @ torch.randn(512, 512)  # the libraries' own buffers
    before = resident("VmRSS")
    trainee = Trainee(quick)
    with PATHS[path]():
        for _ in range(3):
            trainee.step()
    return resident("VmHWM") - before - trainee.state_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument(
        "--seconds", type=float, default=None, help="time to spend (default 90, quick 5)"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    parser.add_argument(
        "--peak-of", choices=PATHS, help=argparse.SUPPRESS
    )  # the child process's job
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.peak_of:
        print(json.dumps(peak_bytes(args.peak_of, args.quick)))
        return

    trainee = Trainee(args.quick)
    losses: dict[str, float] = {}

    def competitor(path: str) -> Competitor:
        def run():
            with PATHS[path]():
                losses[path] = trainee.step()

        return Competitor(run)

    ceilings = Ceilings()
    ceilings.measure()
    seconds = args.seconds or (5 if args.quick else 90)
    timings = interleave({name: competitor(name) for name in PATHS}, seconds)
    ceilings.measure()
    child = [
        sys.executable,
        "-m",
        "benchmarks.bench_train",
        *(["--quick"] if args.quick else []),
        "--peak-of",
    ]
    peaks = {name: json.loads(subprocess.check_output([*child, name])) for name in PATHS}

    ours, theirs = timings["ours"].median, timings["torch"].median
    tokens, flops = trainee.seqlen, trainee.model.flops_per_token(trainee.seqlen) * trainee.seqlen
    for name, t in timings.items():
        print(
            f"{name:<6} {1e3 * t.median:8.0f} ms a step  {tokens / t.median:6.0f} tokens/s  "
            f"{100 * flops / t.median / ceilings.gemm_flops:3.0f} % of the GEMM ceiling  "
            f"peak memory above state {peaks[name] / 2**20:6.0f} MiB"
        )
    print(
        f"ours is {theirs / ours:.3f}× as fast"
        f" with {100 * peaks['ours'] / peaks['torch']:.0f} % of the memory"
    )
    result = {
        "suite": "train step",
        "case": f"GPT-2 {'small shape' if not args.quick else 'quick'}, T={tokens}, B=1, AdamW",
        "dtype": "float32",
        "seconds": {name: dataclasses.asdict(t) for name, t in timings.items()},
        "ratio": theirs / ours,
        "floor_seconds": flops / ceilings.gemm_flops,
        "share_of_floor": flops / ceilings.gemm_flops / ours,
        "bound": "gemm",
        "flops": "6 N + 12 L C T a token",
        "peak_bytes_above_state": peaks,
    }
    m = machine()
    out = args.out or RESULTS / f"train-cpu-{m['isa']}-{m['threads']}threads-{m['commit']}.json"
    write_json(out, ceilings, [result])
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
