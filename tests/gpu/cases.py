"""Runs cases of the shared grid on a device, forward and backward, without pytest.

    python -m gpu.cases attention decode --names causal everything --check

compute-sanitizer watches it, on a few cases and without --check, since the reference's many kernels
are not what it is to look at. With --check every case is held to its bound against float64.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator

import public
import torch

from fastattn.testing import (
    CASES,
    CE_CASES,
    DECODE_CASES,
    attention_results,
    check_attention,
    check_cross_entropy,
    check_decode,
    cross_entropy_results,
    decode_results,
    make_cross_entropy_problem,
    make_decode_problem,
    make_problem,
)

KINDS = {
    "attention": (CASES, make_problem, public.attention, check_attention, attention_results),
    "decode": (DECODE_CASES, make_decode_problem, public.decode, check_decode, decode_results),
    "cross_entropy": (
        CE_CASES, make_cross_entropy_problem, public.cross_entropy, check_cross_entropy,
        cross_entropy_results,
    ),
}  # fmt: skip


def runs(
    kinds: list[str], names: list[str], backend: str, check: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what to call) of each case and dtype that the device has a kernel for."""
    for kind in kinds:
        cases, make, function, checks, results = KINDS[kind]
        for case in cases:
            if names and case.name not in names:
                continue
            for dtype in public.KERNEL_DTYPES:
                p = make(case, dtype)
                if public.refusal(p, backend) is not None:
                    continue
                if kind == "attention" and p.seed is not None:
                    p = p._replace(seed=public.drawn_seed())
                solve = functools.partial(function, backend=backend)
                run = functools.partial(checks if check else results, solve, p)
                yield f"{kind} {case.name} {public.name_of(dtype)}", run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--names", nargs="*", default=[])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_default_device(arguments.device)
    count = failed = 0
    for name, run in runs(arguments.kinds, arguments.names, arguments.backend, arguments.check):
        count += 1
        try:
            run()
        except (AssertionError, RuntimeError) as error:
            failed += 1
            print(f"FAILED {name}: {error}", flush=True)
    print(f"{count} cases, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
