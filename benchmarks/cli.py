"""The command line: run the benchmarks, report, compare two runs, check against the committed."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import compare, digest, machine, plots, report, results, supervise
from .ceilings import pin_threads
from .device import find
from .runner import Plan, Run, key_of, matching
from .show import Show
from .suites import SUITES, cases, peers

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
COMMANDS = {"report": report.main, "compare": compare.main, "check": compare.check_main}
SECONDS = {"cpu": 3.0, "cuda": 0.5}  # of timing, a case
QUICK_SECONDS, QUICK_BUDGET = 0.15, 50.0
LEFT_OUT = "the time budget left out"


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        return run(argv)
    except supervise.DeviceLostError as error:
        print(f"bench: the device is lost: {error}", file=sys.stderr)
        return supervise.DEVICE_LOST
    except KeyboardInterrupt:
        print("interrupted; what was finished is on disk", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fastattn bench",
        description="Time fastattn against its peers. `report`, `compare` and `check` are further "
        "commands: `fastattn bench report --help`.",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument(
        "--suite",
        nargs="+",
        choices=SUITES,
        default=(),
        metavar="NAME",
        help=f"only these: {', '.join(SUITES)}",
    )
    p.add_argument("--shape", default="", help="only cases whose names have all these words")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=(), help="only these")
    p.add_argument("--backend", nargs="+", default=(), help="only these of fastattn's backends")
    p.add_argument("--peer", nargs="+", default=(), help="only these peers: words of their names")
    p.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    p.add_argument(
        "--budget",
        type=float,
        help="seconds of the whole run, the most telling cases"
        f" first; default: as long as it takes, --quick {QUICK_BUDGET:.0f}",
    )
    p.add_argument("--seconds", type=float, help="of timing, a case (default: cpu 3, cuda 0.5)")
    p.add_argument("--threads", type=int, help="of the CPU; default: every core")
    p.add_argument(
        "--out",
        type=Path,
        default=results.RESULTS,
        help="a JSON file, or a folder for <kind of machine>/<date>-<commit>.json; default:"
        " benchmarks/results",
    )
    p.add_argument("--resume", action="store_true", help="go on with that file's missing cases")
    p.add_argument("--no-pictures", action="store_true", help="`report` draws them later")
    p.add_argument("--supervised", action="store_true", help=argparse.SUPPRESS)  # a child's
    p.add_argument("--list", action="store_true", help="only list the cases and peers")
    return p


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    device = find(args.device)
    kind = device.torch_device.type
    threads = pin_threads(args.threads)
    dtypes = [DTYPES[name] for name in args.dtype]
    chosen = matching(cases(kind), suites=args.suite, shape=args.shape, dtypes=dtypes)
    if args.quick:
        chosen = [case for case in chosen if case.quick]
    if not chosen:
        raise ValueError("no case is left by these filters; --list without them shows all")
    asked, named = choose_peers(args.backend, args.peer)
    if args.list:
        return list_all(chosen, asked, device)
    stamp = machine.describe(device.torch_device)
    out = results.path_of(args.out, stamp)
    if args.budget is None and args.quick:
        args.budget = QUICK_BUDGET
    if kind == "cuda" and not args.supervised:
        if importlib.util.find_spec("fastattn.kernels") is None:
            print("not installed, so without Triton's kernels: `make gpu PART=bench` has them")
        return under_supervision(argv, out, args.budget)
    plan = Plan(
        device=device,
        cases=chosen,
        peers=asked,
        seconds=args.seconds or (QUICK_SECONDS if args.quick else SECONDS[kind]),
        out=out,
        quick=args.quick,
        budget=args.budget,
        named=named,
        resume=args.resume,
        supervised=args.supervised,
        options=results.options_of(args),
    )
    with Show(len(chosen)) as show:
        print(
            f"{len(chosen)} cases on {stamp.get('gpu') or stamp['cpu']}, {threads} threads, torch"
            f" {stamp['torch']}; each is on disk when done: {out}"
        )
        bench = Run(plan)
        complete = bench(show.begin, show.done)
    order = sorted(bench.document["results"], key=lambda r: SUITES.index(r["suite"]))
    show.summary(order)
    for text in training_lines(order, bench.document):
        print(text)
    print(f"Ceilings: {digest.ceilings(bench.document)}")
    pictures = [] if args.no_pictures else plots.draw(bench.document, out)
    print(f"wrote {out}" + (f"; pictures beside it: {len(pictures)}" if pictures else ""))
    if not complete:
        have = {results.key(r) for r in order}  # of other suites too, where a run goes on
        left = sum(key_of(case) not in have for case in chosen)
        print(f"{LEFT_OUT} {left} of {len(chosen)} cases")
    return 0


def training_lines(found: list[dict], document: results.Document) -> list[str]:
    """Tokens a second and MFU, where there are training steps among the results."""
    table = digest.training(found, document)
    if table is None:
        return []
    header, _, rows = table
    widths = [max(10, len(name)) for name in header]
    words = [
        row[:2] + [f"{cell:>{w}}" for cell, w in zip(row[2:], widths[2:], strict=True)]
        for row in (header, *rows)
    ]
    lines = [f"{case:<36} {peer.strip('*'):<32}{' '.join(rest)}" for case, peer, *rest in words]
    return [*lines, f"{digest.TRAINING_WORDS}\n"]


def under_supervision(argv: list[str], out: Path, budget: float | None) -> int:
    """The same run in child processes; the first begins a new file unless told to resume."""
    if "--resume" not in argv:
        out.unlink(missing_ok=True)

    def command(left: float | None) -> list[str]:
        more = ["--supervised", "--resume", "--out", str(out)]
        more += [] if left is None else ["--budget", f"{left:.0f}"]
        return [sys.executable, "-m", "benchmarks", *argv, *more]

    return supervise.supervise(command, out, budget)


def choose_peers(backends: Sequence[str], words: Sequence[str]) -> tuple[list, frozenset[str]]:
    """The peers that the filters leave, fastattn's always among them, and those named."""
    every = peers()
    named = {p.name for p in every for word in words if word.lower() in p.name.lower()}
    if words and not named:
        raise ValueError(f"no peer has {' or '.join(words)} in its name; --list shows all")
    ours = list(dict.fromkeys(p.backend for p in every if p.backend not in (None, "package")))
    if unknown := set(backends) - set(ours):
        raise ValueError(f"no backend {', '.join(sorted(unknown))}; there are {', '.join(ours)}")
    kept = []
    for peer in every:
        if peer.ours:
            keep = not backends or peer.backend in (*backends, "package")
        else:
            keep = not words or peer.name in named
        if keep:
            kept.append(peer)
    return kept, frozenset(named)


def list_all(chosen, asked, device) -> int:
    for case in sorted(chosen, key=lambda case: case.rank):
        quick = "quick" if case.quick else ""
        print(f"{case.rank} {case.suite:<20} {case.name:<48} {DTYPE_OF[case.dtype]:<5} {quick}")
    print()
    suites = {case.suite for case in chosen}
    for name, peer in {peer.name: peer for peer in asked if peer.suites & suites}.items():
        here = device.torch_device.type
        reason = peer.absent() if here in peer.devices else f"not for {here}"
        print(f"{name:<32}{reason or ''}".rstrip())
    return 0


DTYPE_OF = {getattr(torch, name): short for short, name in DTYPES.items()}
