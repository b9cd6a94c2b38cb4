"""Blocks of attention weights from lse, against the reference's whole matrix."""

from __future__ import annotations

from functools import partial

import cpu_isa
import pytest
import torch

import fastattn
from fastattn.check import entropy
from fastattn.problem import AttentionProblem
from fastattn.testing import CASES, Case, check_entropy, make_problem, whole_matrix

DENSE = [case for case in CASES if case.dropout_p == 0 and not case.packed]


def options_of(p: AttentionProblem) -> dict:
    window = (p.window_left, p.window_right)
    names = ("scale", "softcap", "mask", "bias", "alibi_slopes", "sinks")
    return {"window": window, **{name: getattr(p, name) for name in names}}


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_is_the_matrix_that_values_are_weighted_by(backend: str, case: Case) -> None:
    p = make_problem(case, torch.float32)
    options = options_of(p)
    _, lse = fastattn.attention(p.q, p.k, p.v, **options, return_lse=True, backend=backend)
    weights = fastattn.attention_weights(p.q, p.k, lse, **options)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), whole_matrix(p), rtol=3e-5, atol=1e-6)


SELECTIONS = [
    {},
    {"rows": 3},
    {"rows": slice(2, 9, 3), "keys": slice(None, 5)},
    {"rows": [5, 0, 5], "heads": [2]},
    {"rows": range(4), "keys": torch.tensor([1, 6]), "heads": slice(1, 4)},
    {"rows": -1, "keys": [-2, 0], "heads": -3},
    {"rows": [], "heads": 1},
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_a_block_is_cut_from_the_whole(selection: dict) -> None:
    case = Case(
        "block", (2, 9, 11), (4, 2), window=(6, 1), softcap=3.0, mask="b1qk", bias="1h1k",
        alibi="bh", sinks=True,
    )  # fmt: skip
    p = make_problem(case, torch.float32)
    options = options_of(p)
    _, lse = fastattn.attention(p.q, p.k, p.v, **options, return_lse=True)
    whole = fastattn.attention_weights(p.q, p.k, lse, **options)
    block = fastattn.attention_weights(p.q, p.k, lse, **selection, **options)
    for dim, name in ((1, "heads"), (2, "rows"), (3, "keys")):
        chosen = torch.arange(whole.shape[dim])
        if name in selection:
            picked = selection[name]
            picked = list(picked) if isinstance(picked, range) else picked
            chosen = chosen[picked].reshape(-1)
        whole = whole.index_select(dim, chosen)
    torch.testing.assert_close(block, whole)


def test_a_block_costs_its_own_scores_only() -> None:
    """100 000 tokens, whose matrix would be 40 GB a head."""
    q, k = torch.randn(2, 1, 100_000, 1, 4)
    lse = torch.full((1, 1, 100_000), 12.0)
    block = fastattn.attention_weights(q, k, lse, rows=[0, 99_999], causal=True)
    assert block.shape == (1, 1, 2, 100_000)
    assert int((block[0, 0, 0] > 0).sum()) == 1


def test_gradients() -> None:
    """Of the weights through q, k and lse: those of softmax."""
    q, k = (t.requires_grad_() for t in torch.randn(2, 1, 6, 2, 8, dtype=torch.float64))
    _, lse = fastattn.attention(q, k, k, causal=True, return_lse=True)
    weights = fastattn.attention_weights(q, k, lse, causal=True, rows=slice(2, 5))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = s.masked_fill(hidden, -torch.inf).softmax(-1)[:, :, 2:5]
    torch.testing.assert_close(weights, expected)
    dout = torch.randn_like(weights)
    got = torch.autograd.grad(weights, (q, k), dout)
    for a, b in zip(got, torch.autograd.grad(expected, (q, k), dout), strict=True):
        torch.testing.assert_close(a, b)


# --- entropy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_entropy(backend: str, case: Case, dtype: torch.dtype) -> None:
    check_entropy(partial(entropy, backend=backend), make_problem(case, dtype))


FEW = ("causal", "window", "mask-empty-rows", "sinks", "no-keys", "gqa-8", "everything")
FEW += tuple(case.name for case in CASES if case.packed)


@pytest.mark.emulated
@pytest.mark.parametrize("case", [c for c in CASES if c.name in FEW], ids=str)
def test_entropy_of_kernels_for_gpus(backend: str, case: Case) -> None:
    check_entropy(partial(entropy, backend=backend), make_problem(case, torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu_isa.others())
def test_entropy_of_every_instruction_set(isa: str) -> None:
    cpu_isa.run_file(__file__, isa, "test_entropy and cpu and not instruction_set")


def test_entropy_of_some_rows_and_heads() -> None:
    case = Case("rows", (2, 9, 11), (4, 2), window=(6, 1), mask="b1qk", bias="1h1k", alibi="bh")
    p = make_problem(case, torch.float32)
    options = options_of(p)
    _, lse = fastattn.attention(p.q, p.k, p.v, **options, return_lse=True)
    expected = torch.special.entr(whole_matrix(p)).sum(-1)
    for block_bytes in (1 << 26, 1, 8 * 11 * 4 * 2 * 4):
        some = fastattn.attention_entropy(
            p.q, p.k, lse, rows=[-1, 0, 3, 4, 5], block_bytes=block_bytes, **options
        )
        torch.testing.assert_close(
            some.double(), expected[:, :, [-1, 0, 3, 4, 5]], rtol=1e-5, atol=1e-5
        )
    some = fastattn.attention_entropy(p.q, p.k, lse, heads=[3, 0], **options)
    torch.testing.assert_close(some.double(), expected[:, [3, 0]], rtol=1e-5, atol=1e-5)
    assert fastattn.attention_entropy(p.q, p.k, lse, rows=[], **options).shape[-1] == 0
    assert fastattn.attention_entropy(p.q, p.k, lse, heads=[], **options).shape == (2, 0, 9)


def test_gradient_of_entropy() -> None:
    q, k = (t.requires_grad_() for t in torch.randn(2, 1, 6, 2, 8, dtype=torch.float64))
    _, lse = fastattn.attention(q, k, k, causal=True, return_lse=True)
    entropy = fastattn.attention_entropy(q, k, lse, causal=True)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    log = s.masked_fill(hidden, -torch.inf).log_softmax(-1)
    expected = -(log.exp() * log.masked_fill(hidden, 0.0)).sum(-1)
    torch.testing.assert_close(entropy, expected)
    got = torch.autograd.grad(entropy.sum(), (q, k))
    for a, b in zip(got, torch.autograd.grad(expected.sum(), (q, k)), strict=True):
        torch.testing.assert_close(a, b)


def test_entropy_of_packed_sequences() -> None:
    """By offsets, by jagged tensors, of some heads, and by the way of the gradient, in blocks."""
    lengths = torch.tensor([3, 0, 6])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packing = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    packing |= {"max_seqlen_q": 6, "max_seqlen_k": 6}
    q, k = torch.randn(9, 4, 8), torch.randn(9, 2, 8)
    _, lse = fastattn.attention_varlen(q, k, k, **packing, causal=True, return_lse=True)
    got = fastattn.attention_entropy(q, k, lse, **packing, causal=True)
    assert got.shape == (4, 9)
    heads = fastattn.attention_entropy(q, k, lse, **packing, causal=True, heads=[3, 0])
    torch.testing.assert_close(heads, got[[3, 0]])
    jagged = (torch.nested.nested_tensor_from_jagged(t, offsets.long()) for t in (q, k))
    torch.testing.assert_close(fastattn.attention_entropy(*jagged, lse, causal=True), got)

    leaf = q.clone().requires_grad_()
    entropy = fastattn.attention_entropy(leaf, k, lse, **packing, causal=True, block_bytes=64)
    torch.testing.assert_close(entropy, got)
    (gradient,) = torch.autograd.grad(entropy.sum(), leaf)
    for begin, end in ((0, 3), (3, 9)):
        one = q[None, begin:end].requires_grad_()
        alone = fastattn.attention_entropy(
            one, k[None, begin:end], lse[None, :, begin:end], causal=True
        )
        torch.testing.assert_close(alone[0], got[:, begin:end])
        (want,) = torch.autograd.grad(alone.sum(), one)
        torch.testing.assert_close(gradient[begin:end], want[0])

    with pytest.raises(ValueError, match="all or none"):
        fastattn.attention_entropy(q, k, lse, cu_seqlens_q=offsets)
    with pytest.raises(ValueError, match="rows are those of a dense call"):
        fastattn.attention_entropy(q, k, lse, **packing, rows=[0])
    with pytest.raises(ValueError, match=r"lse must have shape \(H_q, T_q\) = \(4, 9\)"):
        fastattn.attention_entropy(q, k, lse.mT, **packing)
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to the 9 tokens"):
        fastattn.attention_entropy(q, k, lse, **packing | {"cu_seqlens_q": offsets - 1})


def test_bad_arguments() -> None:
    q, lse = torch.randn(1, 5, 2, 8), torch.zeros(1, 2, 5)
    with pytest.raises(ValueError, match=r"lse must have shape .* = \(1, 2, 5\), got \(1, 5, 2\)"):
        fastattn.attention_weights(q, q, lse.mT)
    with pytest.raises(IndexError, match=r"rows must lie in \[-5, 5\)"):
        fastattn.attention_weights(q, q, lse, rows=[0, 5])
    with pytest.raises(TypeError, match="heads must be an int"):
        fastattn.attention_weights(q, q, lse, heads=torch.tensor([True, False]))


# --- the picture ----------------------------------------------------------------------------------


def test_plot(tmp_path) -> None:
    image = pytest.importorskip("matplotlib.image")
    weights = torch.rand(5, 3, 4)
    figure = fastattn.plot_attention(
        weights, query_labels=list("abc"), key_labels=list("wxyz"), titles=list("12345"), columns=2
    )
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == list("12345")
    assert [label.get_text() for label in shown[0].get_yticklabels()] == list("abc")
    for ax, panel in zip(shown, weights, strict=True):
        assert ax.images[0].get_array().shape == (3, 4)
        torch.testing.assert_close(torch.tensor(ax.images[0].get_array().data), panel)
        assert ax.images[0].get_clim() == shown[0].images[0].get_clim()
    figure.savefig(tmp_path / "heads.png")
    assert image.imread(tmp_path / "heads.png").std() > 0


def test_plot_of_one_head() -> None:
    figure = fastattn.plot_attention(torch.rand(2, 6, requires_grad=True))
    assert sum(bool(ax.images) for ax in figure.axes) == 1


def test_plot_refuses() -> None:
    with pytest.raises(ValueError, match=r"\(rows, keys\) or \(heads, rows, keys\)"):
        fastattn.plot_attention(torch.rand(1, 2, 3, 4))
    with pytest.raises(ValueError, match="2 titles for 3"):
        fastattn.plot_attention(torch.rand(3, 2, 2), titles=["a", "b"])


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fastattn\[plot\]"):
        fastattn.plot_attention(torch.rand(2, 2))
