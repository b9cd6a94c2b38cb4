"""Jagged nested tensors through `attention`: each sequence by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

import fastattn

LENGTHS_Q, LENGTHS_K = (3, 5, 0, 4), (6, 5, 2, 1)
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1), "softcap": 3.0},
    "bias": {"bias": (4, 1, 5, 6)},
}


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def jagged() -> tuple[list[Tensor], list[Tensor]]:
    """Leaves (T, H, D), and q, k, v over them."""
    at_q, at_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    shapes = ((12, 4, 8), (14, 2, 8), (14, 2, 6))
    values = [torch.randn(shape, requires_grad=True) for shape in shapes]
    places = (at_q, at_k, at_k)
    return values, [nested_tensor_from_jagged(*both) for both in zip(values, places, strict=True)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_is_each_sequence(backend: str, options: dict) -> None:
    if "bias" in options:
        options = {"bias": torch.randn(options["bias"])}
    values, (q, k, v) = jagged()
    out, lse = fastattn.attention(q, k, v, **options, return_lse=True, backend=backend)
    assert out.is_nested and out.shape[:2] == q.shape[:2] and out.shape[2:] == (4, 6)
    assert lse.shape == (4, 12)
    grads = torch.autograd.grad(out.values().square().sum(), values)
    expected = []
    for b, parts in enumerate(zip(q.unbind(), k.unbind(), v.unbind(), strict=True)):
        rows, keys = parts[0].shape[0], parts[1].shape[0]
        cut = dict(options)
        if "bias" in cut:
            cut["bias"] = cut["bias"][b : b + 1, :, :rows, :keys]
        batch = (t[None] for t in parts)
        expected.append(fastattn.attention(*batch, **cut, backend=backend)[0])
    torch.testing.assert_close(out.values(), torch.cat(expected))
    expected_grads = torch.autograd.grad(torch.cat(expected).square().sum(), values)
    torch.testing.assert_close(grads, expected_grads)


def test_goes_on_as_a_nested_tensor() -> None:
    _, (q, *_) = jagged()
    mixed = fastattn.attention(q, q, q, causal=True) + q  # the same raggedness
    assert mixed.is_nested and torch.nn.functional.layer_norm(mixed, (8,)).shape == q.shape


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="its graphs of jagged layouts detach numbers"
)
@pytest.mark.parametrize("given", ["", "mask", "bias"])
def test_compiles_whole(given: str) -> None:
    torch._dynamo.reset()
    values, (q, k, v) = jagged()
    scores = torch.randn(4, 1, 5, 6)
    options = {"mask": scores > 0} if given == "mask" else {"bias": scores} if given else {}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, causal=True, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        out = run(q, k, v).values()
        results.append((out, *torch.autograd.grad(out.square().sum(), values)))
    torch.testing.assert_close(*results)
    if given:  # too small for the sequences: the operator says so, which sees the lengths
        options = {name: x[..., :4] for name, x in options.items()}
        torch._dynamo.reset()
        with pytest.raises(Exception, match="max_seqlen_k is 4 but the longest sequence has 6"):
            compiled(q, k, v)


def test_refusals() -> None:
    _, (q, k, v) = jagged()
    strided = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (2, 3)])
    other = nested_tensor_from_jagged(v.values(), offsets(LENGTHS_K))
    holes = torch.nested.narrow(
        torch.randn(2, 6, 4, 8), 1, torch.tensor([0, 1]), torch.tensor([3, 2]), torch.jagged
    )
    for inputs, message in (
        ((q, k.values(), v), "k is not nested"),
        ((strided,) * 3, "q is a strided nested tensor"),
        ((q.transpose(1, 2), k, v), "q must be .batch, sequence, heads"),
        ((q, k, other), "k and v are jagged in different ways"),
        ((holes,) * 3, "q has holes"),
    ):
        with pytest.raises(ValueError, match=message):
            fastattn.attention(*inputs)
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        fastattn.attention(q.values(), k, v)
