"""Attention's forward on the emulator, under every order of events the emulator can make.

test_cuda.py holds it to the contract; here copies land early, late or in between, warps and blocks
take turns in several orders, and what is hidden holds NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import emulated
import public
import pytest
import torch
from emulator.runtime import Library

from fastattn import backend_cuda, reference
from fastattn.testing import (
    CASES,
    CAUSAL,
    Case,
    assert_close_to_reference,
    assert_results_close,
    attention_expected,
    attention_results,
    eager_attention,
    make_problem,
    to_float64,
)

pytestmark = pytest.mark.parametrize(
    "emulated_arch", [80, 75, 90], ids="sm{}".format, indirect=True
)
MODES = ("eager", "random,seed=1", "random,seed=2", "random,seed=3")
NAMES = ("out", "lse")


@pytest.fixture
def emulator(emulated_arch: int) -> Iterator[Library]:
    library = Library(emulated.build())
    yield library
    library.set_options()


QUICK = ("gqa-4-causal", "dims-192-128", "window-both", "everything", "packed-everything")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c.name in QUICK else pytest.mark.slow, id=c.name) for c in CASES],
)
def test_whatever_the_order_of_events(emulator: Library, case: Case, poisoned: None) -> None:
    """The result is the same bit for bit, and no order shows a race."""
    p = make_problem(case, torch.float16)
    if p.dropout_p > 0:
        p = p._replace(seed=public.drawn_seed())
    first = None
    for mode in MODES:
        emulator.set_options(mode)
        result = public.attention(p, "cuda")
        first = first or result
        for ours, before in zip(result, first, strict=True):
            assert torch.equal(ours, before), mode
    assert first is not None
    results = [first, reference.attention(to_float64(p)), eager_attention(p)]
    assert_results_close(*(dict(zip(NAMES, result, strict=True)) for result in results))


RICH: dict[str, Any] = {
    "window": (400, 3), "softcap": 9.0, "mask": "bhqk", "bias": "1hqk", "alibi": "bh",
    "dropout_p": 0.2,
}  # fmt: skip
# Their keys are shared out among blocks of threads, by the kernels for decoding.
FEW_QUERIES = (
    Case("few-causal", (2, 3, 520), (4, 2), 64, window=CAUSAL),
    Case("few-sinks", (1, 1, 600), (2, 1), 40, 72, window=(500, 0), sinks=True),
    Case("few-alibi", (1, 7, 600), (2, 1), 40, softcap=9.0, alibi="h"),
    Case("few-no-tensor-cores", (1, 5, 700), (2, 2), 192, 256, window=(600, 3)),
    Case("few-idle", (1, 40, 513), (2, 1), 96, window=CAUSAL),
    Case(
        "few-packed",
        heads=(4, 2),
        head_dim=64,
        packed=((2, 520), (0, 5), (3, 7), (1, 0)),
        window=CAUSAL,
    ),
    Case("few-packed-sinks", heads=(2, 2), head_dim=144, packed=((1, 5), (2, 600)), sinks=True),
    Case("few-strides", (1, 2, 512), (2, 2), 24, strides="padded"),
    Case("few-masked", (2, 4, 530), (4, 2), 40, mask="b1qk", empty_rows=True),
    Case("few-everything", (1, 5, 520), (4, 2), 64, 128, sinks=True, **RICH),
    Case(
        "few-packed-everything",
        heads=(2, 1),
        head_dim=72,
        packed=((2, 520), (0, 5), (3, 7), (1, 0)),
        **RICH,
    ),
)
MANY_QUERIES = (
    Case("few-keys", (1, 1, 511), (1, 1)),
    Case("few-masked-wide", (1, 1, 512), (1, 1), 136, mask="11qk"),
    Case("few-biased-odd", (1, 1, 512), (1, 1), 36, bias="11qk"),
    Case("few-busy", (5, 17, 512), (1, 1)),  # the emulator has 8 SMs
)


@pytest.mark.parametrize("case", [*FEW_QUERIES, *MANY_QUERIES], ids=str)
def test_few_queries_are_decoded(emulator: Library, case: Case, poisoned: None) -> None:
    p = make_problem(case, torch.float16)
    if p.dropout_p > 0:
        p = p._replace(seed=public.drawn_seed())
    emulator.set_options("without=?")  # lists the places that are passed
    emulator.passed_places()
    results = [public.attention(p, "cuda"), reference.attention(to_float64(p)), eager_attention(p)]
    assert_results_close(*(dict(zip(NAMES, result, strict=True)) for result in results))
    decoded = any(place.startswith("attn_decode") for place in emulator.passed_places())
    assert decoded == (case in FEW_QUERIES)
    assert decoded == ("by the kernels for decoding" in (backend_cuda.remark(p) or ""))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fp32_errs_no_more_than_eager(emulated_arch: int, head_dim: int) -> None:
    """But for one rounding: the bound without its factor. Of the gradients too."""
    case = Case("", (1, 33, 129), (2, 1), head_dim, window=CAUSAL)
    p = make_problem(case, torch.float32)
    results = attention_results(lambda problem: public.attention(problem, "cuda"), p)
    ref64, eager = attention_expected(p)
    for name, ours in results.items():
        assert_close_to_reference(ours, ref64[name], eager[name], 1.0, name)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_mask_keeps_values_from_decoding(emulated_arch: int, value: float) -> None:
    """Of a head beside others in one tile that see them."""
    p = make_problem(Case("", (1, 1, 520), (4, 1), 64, mask="1hqk"), torch.float16)
    assert p.mask is not None
    p.mask[:, :, :, 40] = torch.tensor([False, True, True, True]).view(1, 4, 1)
    p.v[:, 40, :, 3] = value
    out, _ = public.attention(p, "cuda")
    expected, _ = reference.attention(to_float64(p))
    assert torch.equal(out.isfinite(), expected.isfinite()) and out.isfinite().sum() == 4 * 64 - 3
    torch.testing.assert_close(out[:, :, 0].double(), expected[:, :, 0], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("hides", [{"window": (-1, 0)}, {"window": (20, 0)}, {"mask": "b1qk"}])
def test_bad_values_spread_to_what_sees_them(
    emulated_arch: int, hides: dict[str, object], where: str, value: float
) -> None:
    """And no further: not through a hidden key's weight of 0."""
    p = make_problem(Case("", (2, 65, 65), (2, 2), 16, **hides), torch.float16)  # type: ignore[arg-type]
    bad = getattr(p, where).clone()
    bad[1, 40, 1, 3] = value
    p = p._replace(**{where: bad})
    out, lse = public.attention(p, "cuda")
    expected, expected_lse = reference.attention(to_float64(p))
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    clean = expected.isfinite()
    torch.testing.assert_close(out.double()[clean], expected[clean], rtol=1e-2, atol=2e-3)
