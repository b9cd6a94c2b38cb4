"""The backend table: who can compute a problem, in order of preference, and why the others can't.

Nothing falls back in silence: a backend asked for by name (argument or FASTATTN_BACKEND) runs or
raises with its reason; the automatic choice goes down the table, `explain` shows how, and landing
on the reference where kernels were missing warns once.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import products
from .problem import (
    AttentionProblem,
    CrossEntropyProblem,
    DecodeProblem,
    LinearCrossEntropyProblem,
)
from .products import TorchProducts

Problem = AttentionProblem | DecodeProblem | CrossEntropyProblem | LinearCrossEntropyProblem
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _load(module: str) -> ModuleType:
    """Kept here: every call of an operator asks, and import_module takes a microsecond."""
    return importlib.import_module(module, __package__)


class Backend(NamedTuple):
    """One row: a name, two questions, and the module that answers them and has the entry points."""

    name: str
    summary: str
    module: str  # imported on first use

    def unusable(self) -> str | None:
        """None, or why this backend can't run on this machine at all."""
        return self._load().unusable()

    def refuses(self, p: Problem, asked: bool = False) -> str | None:
        """None, or why this backend can't take this problem; `asked` for by name or not."""
        return self.unusable() or self._load().refuses(p, asked)

    def fingerprint(self) -> str:
        """Changes with the kernels; of a usable backend for GPUs."""
        return self._load().fingerprint()

    def remark(self, p: Problem) -> str | None:
        """What there is to say on how this backend takes a problem that it doesn't refuse."""
        remark = getattr(self._load(), "remark", None)
        return None if remark is None else remark(p)

    def _load(self) -> ModuleType:
        return _load(self.module)

    @property
    def attn_fwd(self) -> Callable[[AttentionProblem], tuple[Tensor, Tensor]]:
        return self._load().attn_fwd

    @property
    def attn_entropy(self) -> Callable[[AttentionProblem, Tensor], Tensor]:
        return self._load().attn_entropy

    @property
    def attn_bwd(
        self,
    ) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
        return self._load().attn_bwd

    @property
    def attn_decode(self) -> Callable[[DecodeProblem], tuple[Tensor, Tensor]]:
        return self._load().attn_decode

    @property
    def cross_entropy_fwd(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return self._load().cross_entropy_fwd

    @property
    def cross_entropy_bwd(self) -> Callable[..., Tensor]:
        return self._load().cross_entropy_bwd

    @property
    def linear_cross_entropy_fwd(
        self,
    ) -> Callable[[LinearCrossEntropyProblem], tuple[Tensor, Tensor]] | None:
        """None where it goes through the logits, in chunks."""
        return getattr(self._load(), "linear_cross_entropy_fwd", None)

    def products(self, device: torch.device) -> TorchProducts:
        """The matrix products that go with the cross-entropy kernel."""
        return self.own_products(device) or products.torchs(device)

    def own_products(self, device: torch.device) -> TorchProducts | None:
        """This backend's, if it is usable and has some that are faster than torch's."""
        own = getattr(self._load(), "own_products", None)
        return own(device) if own is not None and self.unusable() is None else None


TABLE = (
    Backend("cuda", "CUDA C++ kernels", ".backend_cuda"),
    Backend("triton", "Triton kernels", ".backend_triton"),
    Backend("cpu", "SIMD C++ kernels", ".backend_cpu"),
    Backend("reference", "eager PyTorch, the specification", ".backend_reference"),
)
_BY_NAME = {row.name: row for row in TABLE}


def row(name: str) -> Backend:
    return _BY_NAME[name]


def requested(backend: str | None) -> str | None:
    """The backend asked for by argument or FASTATTN_BACKEND, or None for the automatic choice."""
    name = backend or os.environ.get("FASTATTN_BACKEND") or None
    if name is not None and name not in _BY_NAME:
        source = "backend" if backend else "FASTATTN_BACKEND"
        raise ValueError(f"{source}={name!r} is no backend; there are {', '.join(_BY_NAME)}")
    return name


def choose(p: Problem, backend: str | None) -> Backend:
    """The row that computes `p`. Raises RuntimeError if the requested one refuses it."""
    name = requested(backend)
    if name is not None:
        row = _BY_NAME[name]
        if (reason := row.refuses(p, asked=True)) is not None:
            raise RuntimeError(f"backend={name!r} can't take this problem: {reason}")
        return row
    refusals: list[str] = []
    for row in TABLE:
        if (reason := row.refuses(p)) is None:
            if row.name == "reference" and p[0].dtype in KERNEL_DTYPES:
                _warn_once("; ".join(refusals))
            return row
        refusals.append(f"{row.name}: {reason}")
    raise RuntimeError("no backend takes this problem: " + "; ".join(refusals))


@functools.cache
def _warn_once(refusals: str) -> None:
    warnings.warn(
        f"fastattn runs on its slow reference path: no kernel takes this problem ({refusals})."
        " Ask for it with backend='reference' to silence this.",
        stacklevel=2,
    )


def own_products(device: torch.device, backend: str | None) -> TorchProducts | None:
    """The requested backend's, or any usable one's, where they are faster than torch's."""
    name = requested(backend)
    rows = TABLE if name is None else (_BY_NAME[name],)
    return next((own for row in rows if (own := row.own_products(device)) is not None), None)


class Explanation(NamedTuple):
    """What `explain` returns; prints as a table."""

    rows: tuple[tuple[str, str], ...]  # (backend, verdict)

    def __str__(self) -> str:
        return "\n".join(f"{name:<10} {verdict}" for name, verdict in self.rows)


def explain_problem(p: Problem, backend: str | None) -> Explanation:
    name = requested(backend)
    rows, chosen = [], False
    for row in TABLE:
        reason = row.refuses(p, asked=row.name == name)
        if reason is not None:
            verdict = f"no: {reason}"
        elif name not in (None, row.name) or chosen:
            verdict = "could, not chosen"
        else:
            verdict, chosen = "chosen" + (" (asked for)" if name else ""), True
        if reason is None and (remark := row.remark(p)) is not None:
            verdict += f": {remark}"
        rows.append((row.name, verdict))
    return Explanation(tuple(rows))
