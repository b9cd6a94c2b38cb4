"""NaN and infinity in what a query doesn't see must not reach its results."""

from __future__ import annotations

import math

import public
import torch

from fastattn import reference
from fastattn.cases import Case, make_problem
from fastattn.testing import to_float64

VALUES = (math.nan, math.inf)
# Odd lengths and an odd head dim leave elements without a partner; windows and a mask hide. The
# second number is the spoiled row: of the last case, a key that the tile's last query does not see
# any more, in a pair with the first key that all of its queries see.
CASES = (
    (Case("causal", (1, 65, 65), (2, 2), 16, window=(-1, 0)), 1),
    (Case("window", (1, 37, 71), (2, 1), 9, 5, window=(7, 3)), 1),
    (Case("mask", (1, 3, 5), (2, 2), 16, mask="11qk"), 1),
    (Case("wide-window", (1, 64, 100), (2, 2), 16, window=(70, 3)), 28),
)


def check_attention(
    case: Case, row: int, where: str, value: float, dtype: torch.dtype, backend: str
) -> None:
    """What comes out, forward and backward, is a number wherever the specification says so."""
    p = make_problem(case, dtype)
    if p.mask is not None:
        mask = torch.ones_like(p.mask)
        mask[..., 1] = False  # no query sees key 1
        p = p._replace(mask=mask)
    bad = getattr(p, where).clone()
    bad[0, row, 0, 3] = value
    p = p._replace(**{where: bad})
    out, lse = public.attention(p, backend)
    out64, lse64 = reference.attention(to_float64(p))
    assert torch.equal(out.isfinite(), out64.isfinite())
    assert torch.equal(lse.isfinite(), lse64.isfinite())

    leaves = [t.detach().clone().requires_grad_() for t in (p.q, p.k, p.v)]
    spoiled, _ = public.attention(p._replace(q=leaves[0], k=leaves[1], v=leaves[2]), backend)
    grads = torch.autograd.grad(spoiled, leaves, torch.ones_like(spoiled))
    leaves64 = [t.detach().double().requires_grad_() for t in leaves]
    p64 = to_float64(p)._replace(q=leaves64[0], k=leaves64[1], v=leaves64[2])
    grads64 = torch.autograd.grad(reference.attention(p64)[0], leaves64, torch.ones_like(out64))
    for name, ours, exact in zip("qkv", grads, grads64, strict=True):
        assert not (~ours.isfinite() & exact.isfinite()).any(), f"d{name}"
