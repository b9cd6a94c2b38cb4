"""Holds a backend to float64 on a device, case by case, by the public functions.

    python -m fastattn.check --backend triton --device cuda:0 attention --names causal gqa-2

This is one process, which a wrong kernel may crash or stop for good: `fastattn check` (proof.py)
runs it in another and watches: a line `case …` says what runs, `FAILED …` what went wrong with it,
`done …` how many ran.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, proof, testing
from .attention import attention as public_attention
from .attention import attention_varlen
from .decode import attention_decode
from .losses import cross_entropy as public_cross_entropy
from .losses import linear_cross_entropy as public_linear_cross_entropy
from .problem import (
    AttentionProblem,
    CrossEntropyProblem,
    DecodeProblem,
    LinearCrossEntropyProblem,
)
from .weights import attention_entropy

SEED = 1234

# --- the public functions, of a problem -----------------------------------------------------------


def drawn_seed() -> Tensor:
    """The Philox key that `attention` draws first after torch.manual_seed(SEED)."""
    torch.manual_seed(SEED)
    return torch.randint(2**63 - 1, ())


def attention(p: AttentionProblem, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse). It draws drawn_seed(), which p.seed should be."""
    options = _options(p) | {"dropout_p": p.dropout_p, "return_lse": True, "backend": backend}
    torch.manual_seed(SEED)
    function = attention_varlen if p.packed else public_attention
    return function(p.q, p.k, p.v, **options)


def entropy(p: AttentionProblem, lse: Tensor, backend: str | None = None) -> Tensor:
    return attention_entropy(p.q, p.k, lse, **_options(p), backend=backend)


def _options(p: AttentionProblem) -> dict[str, Any]:
    """Of the scores, and where packed sequences lie."""
    causal = p.window_right == 0
    names = ["scale", "softcap", "mask", "bias", "alibi_slopes", "sinks"]
    if p.packed:
        names += ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    window = (p.window_left, -1 if causal else p.window_right)
    return {"causal": causal, "window": window, **{name: getattr(p, name) for name in names}}


def decode(p: DecodeProblem, backend: str | None = None) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = p._asdict()
    q, k_cache, v_cache = (options.pop(name) for name in ("q", "k_cache", "v_cache"))
    window = (options.pop("window_left"), options.pop("window_right"))
    return attention_decode(
        q, k_cache, v_cache, **options, window=window, return_lse=True, backend=backend
    )


def cross_entropy(p: CrossEntropyProblem, backend: str | None = None) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = p._asdict()
    logits, target = options.pop("logits"), options.pop("target")
    return public_cross_entropy(
        logits, target, **options, reduction="none", return_lse=True, backend=backend
    )


def linear_cross_entropy(
    p: LinearCrossEntropyProblem, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = p._asdict()
    x, linear_weight, target = (options.pop(name) for name in ("x", "linear_weight", "target"))
    return public_linear_cross_entropy(
        x, linear_weight, target, **options, reduction="none", return_lse=True, backend=backend
    )


# --- the cases ------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How one type of problem is held to the reference."""

    cases: Sequence[Any]
    make: Callable[[Any, torch.dtype], Any]  # a case's problem
    function: Callable[..., Any]
    check: Callable[[Callable, Any], None]
    results: Callable[[Callable, Any], testing.Results]  # both passes, compared with nothing
    also: tuple[tuple[str, Kind], ...] = ()  # (name, how) of what else must pass for its proof


ENTROPY = Kind(
    testing.CASES, testing.make_problem, entropy, testing.check_entropy, testing.entropy_results
)


KINDS = {
    proof.KIND_OF[problem]: kind
    for problem, kind in {
        AttentionProblem: Kind(
            testing.CASES,
            testing.make_problem,
            attention,
            testing.check_attention,
            testing.attention_results,
            also=(("entropy", ENTROPY),),
        ),
        DecodeProblem: Kind(
            testing.DECODE_CASES,
            testing.make_decode_problem,
            decode,
            testing.check_decode,
            testing.decode_results,
        ),
        CrossEntropyProblem: Kind(
            testing.CE_CASES,
            testing.make_cross_entropy_problem,
            cross_entropy,
            testing.check_cross_entropy,
            testing.cross_entropy_results,
        ),
        LinearCrossEntropyProblem: Kind(
            testing.LINEAR_CE_CASES,
            testing.make_linear_cross_entropy_problem,
            linear_cross_entropy,
            testing.check_linear_cross_entropy,
            testing.linear_cross_entropy_results,
        ),
    }.items()
}


def runs(
    kinds: Sequence[str], names: Sequence[str], backend: str, compare: bool = True
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what to call) of each case and dtype that the backend has a kernel for."""
    row = backends.row(backend)
    parts = (part for kind in kinds for part in ((kind, KINDS[kind]), *KINDS[kind].also))
    for name, kind in parts:
        for case in kind.cases:
            if names and case.name not in names:
                continue
            for dtype in backends.KERNEL_DTYPES:
                p = kind.make(case, dtype)
                if row.refuses(p, asked=True) is not None:  # as sm_75 does bfloat16
                    continue
                if getattr(p, "seed", None) is not None:
                    p = p._replace(seed=drawn_seed())
                hold = kind.check if compare else kind.results
                run = partial(hold, partial(kind.function, backend=backend), p)
                yield f"{name} {case.name} {str(dtype).removeprefix('torch.')}", run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.check", description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--names", nargs="*", default=[], help="of cases; default: all")
    parser.add_argument(
        "--only-run", action="store_true", help="compare with nothing, for a sanitizer to watch"
    )
    arguments = parser.parse_args(argv)
    torch.set_default_device(arguments.device)
    kinds = arguments.kinds or list(KINDS)
    count = failed = 0
    for name, run in runs(kinds, arguments.names, arguments.backend, not arguments.only_run):
        print("case", name, flush=True)
        count += 1
        try:
            run()
        except AssertionError as error:
            failed += 1
            print("FAILED", *str(error).split("\n"), flush=True)
        except RuntimeError as error:  # a GPU that has faulted does nothing any more
            failed += 1
            print("FAILED, and no other case after it:", *str(error).split("\n"), flush=True)
            break
    print(f"done {count} cases, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
