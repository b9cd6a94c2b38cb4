"""Bad arguments raise the right error, name themselves, and never reach a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastattn
from fastattn import backends, validate


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choosing a backend, which comes just before a kernel, fails these tests."""

    def refuse(*args: object) -> None:
        raise AssertionError("a backend was chosen")

    monkeypatch.setattr(backends, "choose", refuse)
    yield


def rand(*shape: int, **options: Any) -> torch.Tensor:
    return torch.randn(*shape, **options)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check(call: Callable, arguments: dict, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(**(arguments | changes))


# as plain PyTorch and as an operator
both = pytest.mark.parametrize("asked", [None, "reference"])


def changed(values: list[tuple[dict, type, str]]) -> Any:
    """(changes, error, message) as parameters, named by what changes and how it complains."""
    return pytest.mark.parametrize(
        ("changes", "error", "message"),
        [pytest.param(*v, id=f"{'-'.join(v[0])}:{v[2][:24]}") for v in values],
    )


# --- attention ------------------------------------------------------------------------------------

MIXED = "they must be the same"
NO_MASK = torch.ones(5, 7, dtype=torch.bool)


@changed(
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
        ({"q": rand(5, 4, 8)}, ValueError, "q must have 4 dimensions"),
        ({"v": rand(2, 7, 2, 8, 1)}, ValueError, "v must have 4 dimensions"),
        ({"q": rand(2, 5, 4, 8).int()}, TypeError, "q must be float16, bfloat16, float32 or"),
        ({"q": rand(2, 5, 4, 8).half()}, TypeError, f"k has dtype.*{MIXED}"),
        ({"v": rand(2, 7, 2, 8).double()}, TypeError, f"v has dtype.*{MIXED}"),
        ({"k": rand(2, 7, 2, 8, device="meta")}, ValueError, f"k is on meta.*{MIXED}"),
        ({"q": rand(3, 5, 4, 8)}, ValueError, r"batch sizes differ: q \(3, 5, 4, 8\)"),
        ({"v": rand(2, 6, 2, 8)}, ValueError, "k and v have different lengths"),
        ({"v": rand(2, 7, 4, 8)}, ValueError, "k and v have different head counts"),
        ({"q": rand(2, 5, 3, 8)}, ValueError, "3 heads of q can't be grouped over the 2 heads"),
        ({"q": rand(2, 5, 1, 8)}, ValueError, "1 heads of q can't be grouped over the 2 heads"),
        ({"q": rand(2, 5, 0, 8)}, ValueError, "0 heads of q can't be grouped"),
        ({"q": rand(2, 5, 4, 9)}, ValueError, "q and k have different head dims, 9 and 8"),
        ({"v": rand(2, 7, 2, 257)}, ValueError, "v has head dim 257; allowed are 1 to 256"),
        ({"v": rand(2, 7, 2, 0)}, ValueError, "v has head dim 0"),
        ({"q": rand(2, 5, 4, 0), "k": rand(2, 7, 2, 0)}, ValueError, "q has head dim 0"),
        ({"q": rand(2, 5, 4, 260), "k": rand(2, 7, 2, 260)}, ValueError, "q has head dim 260"),
        ({"window": 3}, ValueError, r"window must be a pair \(left, right\), got 3"),
        ({"window": (1, 2, 3)}, ValueError, "window must be a pair"),
        ({"window": (-2, 0)}, ValueError, "window left must be ≥ -1"),
        ({"window": (0, -7)}, ValueError, "window right must be ≥ -1"),
        ({"window": (1.0, 0)}, TypeError, "window left must be an int, got 1.0"),
        ({"window": (1, "a")}, TypeError, "window right must be an int"),
        ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"scale": "large"}, TypeError, "scale must be a number, got 'large'"),
        ({"softcap": -1.0}, ValueError, "softcap must be finite and ≥ 0, got -1.0"),
        ({"softcap": math.inf}, ValueError, "softcap must be finite"),
        ({"softcap": None}, TypeError, "softcap must be a number, got None"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be finite and ≥ 0 and ≤ 1, got 1.5"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p must be"),
        ({"mask": rand(5, 7)}, TypeError, "mask must be bool .* got torch.float32; bias is for"),
        ({"mask": [[True]]}, TypeError, "mask must be a tensor"),
        ({"mask": NO_MASK[:4]}, ValueError, r"mask of shape \(4, 7\) does not broadcast"),
        ({"mask": NO_MASK[None, None, None]}, ValueError, "mask of shape"),
        ({"mask": NO_MASK.expand(3, 1, 5, 7)}, ValueError, r"= \(2, 4, 5, 7\)"),
        ({"mask": NO_MASK.to("meta")}, ValueError, f"mask is on meta.*{MIXED}"),
        ({"bias": NO_MASK}, TypeError, "bias must be floating point, got torch.bool; mask is for"),
        ({"bias": rand(5, 6)}, ValueError, r"bias of shape \(5, 6\) does not broadcast"),
        ({"bias": rand(2, 2, 5, 7)}, ValueError, "bias of shape"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        ({"bias": rand(5, 7, device="meta")}, ValueError, f"bias is on meta.*{MIXED}"),
        ({"alibi_slopes": rand(2)}, ValueError, r"alibi_slopes must have shape \(4,\) or \(2, 4\)"),
        ({"alibi_slopes": rand(3, 4)}, ValueError, "alibi_slopes must have shape"),
        ({"alibi_slopes": rand(4).int()}, TypeError, "alibi_slopes must be floating point"),
        ({"sinks": rand(2, 4)}, ValueError, r"sinks must have shape \(4,\), got \(2, 4\)"),
        ({"sinks": rand(4, device="meta")}, ValueError, f"sinks is on meta.*{MIXED}"),
        ({"sinks": torch.ones(4).bool()}, TypeError, "sinks must be floating point"),
        ({"backend": "fastest"}, ValueError, "backend='fastest' is no backend; there are"),
    ]
)
@pytest.mark.parametrize("function", [fastattn.attention, fastattn.explain])
def test_attention_refuses(function: Callable, changes: dict, error: type, message: str) -> None:
    arguments = {"q": rand(2, 5, 4, 8), "k": rand(2, 7, 2, 8), "v": rand(2, 7, 2, 8)}
    check(function, arguments, changes, error, message)


@pytest.mark.parametrize("under", ["autocast", "meta"])
def test_attention_refuses_alike(under: str) -> None:
    q, k = rand(2, 5, 3, 8), rand(2, 7, 2, 8)
    if under == "meta":
        q, k = q.to("meta"), k.to("meta")
    with (
        torch.autocast("cpu", enabled=under == "autocast"),
        pytest.raises(ValueError, match="can't be grouped"),
    ):
        fastattn.attention(q, k, k)


def test_a_transposed_layout_gets_a_hint() -> None:
    """(B, H, S, D) tensors whose shapes betray it: unequal lengths, or a batch of lengths."""
    q, k = rand(2, 8, 5, 64), rand(2, 8, 7, 64)
    with pytest.raises(ValueError, match=r"transpose\(1, 2\).*scaled_dot_product_attention"):
        fastattn.attention(q, k, k)
    with pytest.raises(ValueError) as error:  # wrong either way
        fastattn.attention(rand(2, 8, 5, 64), rand(2, 3, 7, 64), rand(2, 3, 7, 64))
    assert "transpose" not in str(error.value)


# --- packed sequences -----------------------------------------------------------------------------


@changed(
    [
        ({"q": rand(1, 9, 4, 8)}, ValueError, "q must have 3 dimensions"),
        ({"q": rand(9, 3, 8)}, ValueError, r"expected \(tokens, heads, head_dim\)"),
        ({"cu_seqlens_q": [0, 9]}, TypeError, "cu_seqlens_q must be a tensor"),
        ({"cu_seqlens_q": int32(0, 4, 9).long()}, TypeError, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_q": int32(0, 4, 9)[None]}, ValueError, "cu_seqlens_q must have 1 dim"),
        ({"cu_seqlens_q": int32(0, 9)}, ValueError, "must both have batch . 1 entries, got 2 and"),
        ({"cu_seqlens_q": int32(), "cu_seqlens_k": int32()}, ValueError, "entries, got 0 and 0"),
        ({"cu_seqlens_q": int32(0, 4, 8)}, ValueError, "cu_seqlens_q must rise from 0 to the 9"),
        ({"cu_seqlens_q": int32(1, 4, 9)}, ValueError, "cu_seqlens_q must rise from 0"),
        ({"cu_seqlens_k": int32(0, 12, 11)}, ValueError, "cu_seqlens_k must rise from 0"),
        ({"cu_seqlens_k": int32(0, -1, 11)}, ValueError, "cu_seqlens_k must rise from 0"),
        ({"cu_seqlens_k": int32(0, 4, 11).to("meta")}, ValueError, "cu_seqlens_k is on meta"),
        ({"max_seqlen_q": 4}, ValueError, "max_seqlen_q is 4 but the longest sequence has 5"),
        ({"max_seqlen_k": 6}, ValueError, "max_seqlen_k is 6 but the longest sequence has 7"),
        ({"mask": NO_MASK[:4]}, ValueError, r"= \(2, 4, 5, 7\)"),
        ({"alibi_slopes": rand(9, 4)}, ValueError, r"alibi_slopes must have shape \(4,\) or"),
    ]
)
@both
def test_attention_varlen_refuses(
    asked: str | None, changes: dict, error: type, message: str
) -> None:
    arguments = {
        "q": rand(9, 4, 8),
        "k": rand(11, 2, 8),
        "v": rand(11, 2, 8),
        "cu_seqlens_q": int32(0, 4, 9),
        "cu_seqlens_k": int32(0, 4, 11),
        "max_seqlen_q": 5,
        "max_seqlen_k": 7,
        "backend": asked,
    }
    check(fastattn.attention_varlen, arguments, changes, error, message)


# --- losses ---------------------------------------------------------------------------------------

COMMON: list[tuple[dict, type, str]] = [
    ({"target": [1, 2]}, TypeError, "target must be a tensor"),
    ({"target": torch.zeros(6)}, TypeError, "target must be int64 class indices"),
    ({"target": torch.zeros(6, dtype=torch.int32)}, TypeError, "target must be int64"),
    ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target must have shape \(6,\)"),
    ({"target": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, "target must have shape"),
    ({"target": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "target is on meta"),
    ({"target": torch.full((6,), 9)}, IndexError, "target 9 is out of range for 9 classes"),
    ({"target": torch.full((6,), -1)}, IndexError, "target -1 is out of range"),
    ({"ignore_index": -1}, IndexError, "target -100 is out of range"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an integer"),
    ({"weight": rand(8)}, ValueError, r"weight must be floating point of shape \(9,\)"),
    ({"weight": torch.ones(9).int()}, ValueError, "weight must be floating point"),
    ({"weight": [1.0] * 9}, TypeError, "weight must be a tensor"),
    ({"weight": rand(9, device="meta")}, ValueError, "weight is on meta"),
    ({"reduction": "average"}, ValueError, "reduction must be one of mean, sum, none"),
    ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be"),
    ({"z_loss": -1}, ValueError, "z_loss must be"),
    ({"softcap": math.nan}, ValueError, "softcap must be"),
    ({"backend": "x"}, ValueError, "backend='x' is no backend"),
]


def targets() -> torch.Tensor:
    return torch.tensor([0, 1, -100, 3, 4, 8])


@changed(
    [
        *COMMON,
        ({"input": 1.0}, TypeError, "input must be a tensor"),
        ({"input": torch.tensor(1.0)}, ValueError, "input must have at least the class dim"),
        ({"input": rand(6, 9).long()}, TypeError, "input must be float16"),
        ({"inplace": True, "reduction": "none"}, ValueError, "inplace needs reduction"),
        ({"inplace": True, "return_lse": True}, ValueError, "inplace needs reduction"),
    ]
)
@both
def test_cross_entropy_refuses(asked: str | None, changes: dict, error: type, message: str) -> None:
    arguments = {"input": rand(6, 9), "target": targets(), "backend": asked}
    check(fastattn.cross_entropy, arguments, changes, error, message)


@changed(
    [
        *COMMON,
        ({"input": 1.0}, TypeError, "input must be a tensor"),
        ({"input": rand(6, 5)}, ValueError, "must end in linear_weight's 4 columns"),
        ({"input": torch.tensor(1.0)}, ValueError, "must end in linear_weight's 4 columns"),
        ({"linear_weight": None}, TypeError, "linear_weight must be a tensor"),
        ({"linear_weight": rand(9)}, ValueError, "linear_weight must have 2 dimensions"),
        ({"linear_weight": rand(9, 4).half()}, TypeError, f"linear_weight has dtype.*{MIXED}"),
        ({"linear_weight": rand(9, 4, device="meta")}, ValueError, "linear_weight is on meta"),
        ({"linear_bias": rand(8)}, ValueError, r"linear_bias must have shape \(9,\)"),
        ({"linear_bias": rand(9).double()}, TypeError, f"linear_bias has dtype.*{MIXED}"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be an integer > 0, got 0"),
        ({"workspace_bytes": 1e9}, ValueError, "workspace_bytes must be an integer > 0"),
    ]
)
@both
def test_linear_cross_entropy_refuses(
    asked: str | None, changes: dict, error: type, message: str
) -> None:
    arguments = {"input": rand(6, 4), "linear_weight": rand(9, 4), "target": targets()}
    check(fastattn.linear_cross_entropy, arguments | {"backend": asked}, changes, error, message)


# --- pieces ---------------------------------------------------------------------------------------


def test_window_folds_causal_in() -> None:
    assert validate.window(False, (-1, -1)) == (-1, -1)
    assert validate.window(True, (-1, -1)) == (-1, 0)
    assert validate.window(True, (3, 5)) == (3, 0)
    assert validate.window(False, [3, 5]) == (3, 5)


def test_number_accepts_what_float_takes() -> None:
    assert validate.number("x", 1) == 1.0
    assert validate.number("x", torch.tensor(0.5)) == 0.5
    assert validate.number("x", True, 0, 1) == 1.0
