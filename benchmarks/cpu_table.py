"""What the CPU kernels are to reach beside torch's, case by case, and what they do.

Cases, method, results file and pictures are those of `fastattn bench`; of peers there is torch's
own function alone. It goes on with the results file of this day and commit, so that it can be cut
and called again, and cases that are there are not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import digest, machine, plots, results, suites
from .attention import Attention
from .bench_cpu import HELD
from .case import Case, short
from .ceilings import pin_threads
from .decode import Decode
from .device import Cpu
from .losses import CrossEntropy, LinearCrossEntropy
from .runner import Plan, Run, key_of
from .show import Show, milliseconds

SECONDS = 1.0  # of timing, a case


class Goal(NamedTuple):
    ratio: float  # torch's time over ours, at least
    share: float = 0.0  # of the floor

    def met(self, result: dict) -> bool:
        ratio, mine = results.ratio(result), results.fastest(result, ours=True)
        if ratio is None or mine is None:
            return False
        return ratio >= self.ratio and result["peers"][mine]["share_of_floor"] >= self.share

    def __str__(self) -> str:
        return f"{self.ratio:.2f}" + (f", {self.share:.0%} of the floor" if self.share else "")


ATTENTION = {  # by dtype, passes and whether causal: for each of suites.TABLE_SHAPES
    ("fp32", "fwd", False): (1.45, 1.28, 1.28, 1.15),
    ("fp32", "fwd", True): (2.4, 1.8, 1.45, 1.28),
    ("fp32", "fwd+bwd", False): (1.45, 1.28, 1.2, 1.10),
    ("fp32", "fwd+bwd", True): (2.3, 1.8, 1.38, 1.22),
    ("bf16", "fwd", False): (2.0, 2.0, 2.0, 1.95),
    ("bf16", "fwd", True): (3.2, 2.7, 2.25, 2.15),
    ("bf16", "fwd+bwd", False): (2.7, 2.2, 2.1, 1.95),
    ("bf16", "fwd+bwd", True): (4.5, 3.1, 2.3, 2.1),
}
HELD_ATTENTION = {  # for every shape, where both are held to AVX2
    ("fp32", "fwd", False): 1.08,
    ("fp32", "fwd", True): 1.2,
    ("fp32", "fwd+bwd", False): 1.08,
    ("fp32", "fwd+bwd", True): 1.2,
    ("bf16", "fwd+bwd", False): 5.0,
    ("bf16", "fwd+bwd", True): 5.0,
}
IN_PLACE = {"fp32": 8.0, "bf16": 7.0}
LINEAR = {"fp32": 1.4, "bf16": 1.9}


def rows() -> Iterator[tuple[Case, Goal]]:
    """The table's cases with their goals, on the widest instruction set."""
    for case in suites.cases("cpu"):
        dtype, goal = short(case.dtype), None
        match case:
            case Attention(suite="attention-fwd" | "attention-bwd"):
                shape = (case.batch, case.heads, case.seqlen, case.head_dim)
                goals = ATTENTION.get((dtype, case.passes, case.causal))
                if goals is not None and shape in suites.TABLE_SHAPES:
                    goal = Goal(goals[suites.TABLE_SHAPES.index(shape)])
            case Decode(batch=8, keys=4096, heads=32, kv_heads=8):
                goal = Goal(2.7, share=0.9)
            case Decode(batch=8, keys=4096, heads=32, kv_heads=32):
                goal = Goal(0.98)
            case CrossEntropy(rows=2048, passes="fwd+bwd in place"):
                goal = Goal(IN_PLACE[dtype])
            case CrossEntropy(rows=2048):
                goal = Goal(4.0)
            case LinearCrossEntropy(rows=2048):
                goal = Goal(LINEAR[dtype])
        if goal is not None:
            yield case, goal


def held_rows() -> Iterator[tuple[Case, Goal]]:
    """Those that have goals where both are held to AVX2."""
    for case, _ in rows():
        if isinstance(case, Attention):
            ratio = HELD_ATTENTION.get((short(case.dtype), case.passes, case.causal))
            if ratio is not None:
                yield case, Goal(ratio)


def table(asked: list[tuple[Case, Goal]], document: results.Document) -> str:
    known = {results.key(r): r for r in document["results"]}
    lines = [f"{'':<54}{'ours ms':>9}{'torch ms':>10}{'ratio':>8}{'floor':>7}{'of':>9}  goal"]
    met = [0, 0]  # missed, met
    for case, goal in asked:
        result = known.get(key_of(case))
        words = case.name if isinstance(case, Attention) else f"{case.suite} {case.name}"
        head = f"{words:<48}{short(case.dtype):<6}"
        if result is None or (ratio := results.ratio(result)) is None:
            lines.append(f"{head}{'not measured' if result is None else 'failed':>43}  {goal}")
            continue
        mine = results.fastest(result, ours=True)
        assert mine is not None
        cells = [milliseconds(results.median(result, x)) for x in (mine, case.baseline)]
        share = result["peers"][mine]["share_of_floor"]
        line = f"{head}{cells[0]:>9}{cells[1]:>10}{ratio:>8.2f}{share:>7.0%}{result['bound']:>9}"
        met[goal.met(result)] += 1
        lines.append(f"{line}  {goal}  {'met' if goal.met(result) else 'MISSED'}")
    return "\n".join([*lines, f"{met[True]} goals met, {met[False]} missed"])


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="bench_cpu.py", description=__doc__)
    p.add_argument("--isa", choices=HELD, help="hold torch and fastattn to this instruction set")
    p.add_argument("--budget", type=float, help="seconds; call it again to go on")
    p.add_argument("--seconds", type=float, default=SECONDS, help="of timing, a case")
    p.add_argument("--threads", type=int, help="default: every core")
    p.add_argument("--out", type=Path, default=results.RESULTS, help="as of `fastattn bench`")
    args = p.parse_args(argv)
    pin_threads(args.threads)
    device = Cpu()
    stamp = machine.describe(device.torch_device)
    if args.isa and (stamp["isa"], stamp["torch_isa"].lower()) != (args.isa, args.isa):
        raise SystemExit(f"bench_cpu: {args.isa} was asked for, but it is {stamp['kind']}")
    asked = list(rows()) if args.isa is None else list(held_rows())
    cases = [case for case, _ in asked]
    baselines = {case.baseline for case in cases}
    plan = Plan(
        device=device,
        cases=cases,
        peers=[p for p in suites.peers() if p.backend == "cpu" or p.name in baselines],
        seconds=args.seconds,
        out=results.path_of(args.out, stamp),
        quick=args.isa is not None,  # fewer rounds: torch's bf16 takes seconds a call in AVX2
        budget=args.budget,
        resume=True,
        options=results.options_of(args),
    )
    with Show(len(cases)) as show:
        print(f"{len(cases)} cases on {stamp['cpu']}, each on disk when done: {plan.out}")
        run = Run(plan)
        complete = run(show.begin, show.done)
    print(f"\n{table(asked, run.document)}\n\nCeilings: {digest.ceilings(run.document)}")
    print(f"wrote {plan.out}; pictures beside it: {len(plots.draw(run.document, plan.out))}")
    if not complete:
        print("the time budget left some out: the same command goes on")
    return 0
