"""The operators and their autograd under PyTorch's machinery: opcheck, compile, export, func."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import public
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.problem import CrossEntropyProblem, LinearCrossEntropyProblem
from fastattn.testing import (
    CASES,
    CE_CASES,
    DECODE_CASES,
    make_cross_entropy_problem,
    make_decode_problem,
    make_problem,
    random_like,
)

VOCAB = 33


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Each test compiles anew: compiled code of one function object is limited to a few shapes."""
    torch._dynamo.reset()
    yield


def by_name(cases: tuple, *names: str) -> list:
    return [case for case in cases if case.name in names]


# --- opcheck: schemas, fakes, strides and dtypes of every operator --------------------------------

ATTENTION = by_name(
    CASES, "causal", "everything", "packed-everything", "no-keys-sinks", "strides-bhsd"
)
DECODE = by_name(DECODE_CASES, "plain", "paged-everything", "empty-cache-sinks")
LOSS = by_name(CE_CASES, "plain", "everything", "no-rows")
UTILS = ("test_schema", "test_faketensor")  # raw operators have no autograd to check


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_opcheck_attention(backend: str, case: Any) -> None:
    p = make_problem(case, torch.float32)
    opcheck(torch.ops.fastattn.attn_fwd.default, (*p, backend), test_utils=UTILS)
    out, lse = torch.ops.fastattn.attn_fwd(*p, backend)
    gradients = (out, lse, random_like(out, 1), random_like(lse, 2), False)
    opcheck(torch.ops.fastattn.attn_bwd.default, (*p, *gradients, backend), test_utils=UTILS)
    into = tuple(torch.empty_like(t) for t in (p.q, p.k, p.v))
    gradients = (out, lse, random_like(out, 1), None, False, *into)
    bare = p._replace(bias=None, sinks=None)
    opcheck(
        torch.ops.fastattn.attn_bwd_into.default, (*bare, *gradients, backend), test_utils=UTILS
    )
    opcheck(torch.ops.fastattn.attn_entropy.default, (*p, lse, backend), test_utils=UTILS)


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_opcheck_decode(backend: str, case: Any) -> None:
    p = make_decode_problem(case, torch.float32)
    # NaN where the cache holds nothing would be unequal to itself
    p = p._replace(k_cache=p.k_cache.nan_to_num(), v_cache=p.v_cache.nan_to_num())
    opcheck(torch.ops.fastattn.attn_decode.default, (*p, backend), test_utils=UTILS)
    p = p._replace(k=None, v=None)
    opcheck(torch.ops.fastattn.attn_decode_read.default, (*p, backend), test_utils=UTILS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=public.name_of)
@pytest.mark.parametrize("case", LOSS, ids=str)
def test_opcheck_cross_entropy(backend: str, case: Any, dtype: torch.dtype) -> None:
    ops = torch.ops.fastattn
    p = make_cross_entropy_problem(case, dtype)
    rows = torch.randn(p.logits.shape[0])
    _, lse = ops.cross_entropy_fwd(*p, backend)
    opcheck(ops.cross_entropy_fwd.default, (*p, backend), test_utils=UTILS)
    opcheck(ops.cross_entropy_bwd.default, (*p, lse, rows, rows, backend), test_utils=UTILS)
    scale = torch.tensor(0.5)
    opcheck(ops.cross_entropy_fwd_bwd.default, (*p, scale, backend), test_utils=UTILS)
    opcheck(ops.cross_entropy_fwd_bwd_.default, (*p, scale, backend), test_utils=UTILS)


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=public.name_of)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_opcheck_linear_cross_entropy(backend: str, bias: bool, dtype: torch.dtype) -> None:
    ops, n, budget = torch.ops.fastattn, 7, 3 * 4 * VOCAB
    x, w, b = (torch.randn(s).to(dtype) for s in ((n, 8), (VOCAB, 8), (VOCAB,)))
    p = LinearCrossEntropyProblem(x, w, b if bias else None, torch.arange(n), torch.rand(VOCAB))
    rows = torch.randn(n)
    _, lse = ops.linear_cross_entropy_fwd(*p, budget, backend)
    opcheck(ops.linear_cross_entropy_fwd.default, (*p, budget, backend), test_utils=UTILS)
    backward = (*p, lse, rows, rows, budget, backend)
    opcheck(ops.linear_cross_entropy_bwd.default, backward, test_utils=UTILS)
    for wanted in ((True, True, bias), (False, True, False)):
        both = (*p, torch.tensor(0.5), *wanted, budget, backend)
        opcheck(ops.linear_cross_entropy_fwd_bwd.default, both, test_utils=UTILS)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_opcheck_linear(bias: bool) -> None:
    x, weight = torch.randn(9, 16), torch.randn(8, 16)
    rows = torch.randn(8) if bias else None
    opcheck(torch.ops.fastattn.linear.default, (x, weight, rows, None), test_utils=UTILS)


def test_every_operator_is_checked() -> None:
    """A new operator belongs into the tests above."""
    names = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastattn::")
    }
    losses = {"cross_entropy_fwd", "cross_entropy_bwd", "linear_cross_entropy_fwd"}
    losses |= {"cross_entropy_fwd_bwd", "cross_entropy_fwd_bwd_"}
    losses |= {"linear_cross_entropy_bwd", "linear_cross_entropy_fwd_bwd"}
    attention = {"attn_fwd", "attn_bwd", "attn_bwd_into", "attn_entropy"}
    attention |= {"attn_decode", "attn_decode_read"}
    assert names == {f"fastattn::{n}" for n in losses | attention | {"linear"}}


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_fakes_have_the_shapes_of_the_real_thing_past_2_to_31(case: Any) -> None:
    p = make_problem(case, torch.bfloat16)
    batch = 2**31
    if p.packed or p.q.shape[1] == 0:
        return
    big = [torch.empty((batch, *t.shape[1:]), dtype=t.dtype, device="meta") for t in p[:3]]
    out, lse = fastattn.attention(*big, return_lse=True)
    assert out.shape == (batch, *p.q.shape[1:3], p.v.shape[3]) and out.dtype == torch.bfloat16
    assert lse.shape == (batch, p.q.shape[2], p.q.shape[1]) and lse.dtype == torch.float32


def test_losses_on_meta() -> None:
    z = torch.empty(6, VOCAB, device="meta", requires_grad=True)
    target = torch.empty(6, dtype=torch.int64, device="meta")
    w = torch.empty(9, VOCAB, device="meta", requires_grad=True)
    fastattn.cross_entropy(z, target).backward()
    fastattn.linear_cross_entropy(z, w, target).backward()
    assert z.grad.is_meta and w.grad.shape == w.shape


# --- functions to transform -----------------------------------------------------------------------


BACKEND = "cpu"  # what these functions run on; see test_the_reference_compiles


def attention_loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    options = {"causal": True, "softcap": 5.0, "return_lse": True, "backend": BACKEND}
    out, lse = fastattn.attention(q, k, v, bias=bias, sinks=sinks, **options)
    return out.square().sum() + lse.sum()


def cross_entropy_loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    target = torch.arange(x.shape[0], device=x.device)
    return fastattn.cross_entropy(x @ w.T + b, target, z_loss=0.1, backend=BACKEND)


def linear_loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    target = torch.arange(x.shape[0], device=x.device)
    return fastattn.linear_cross_entropy(x, w, target, linear_bias=b, backend=BACKEND)


def linear_rows_loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    target = torch.arange(x.shape[0], device=x.device)
    options = {"reduction": "none", "return_lse": True, "backend": BACKEND}
    loss, lse = fastattn.linear_cross_entropy(x, w, target, linear_bias=b, **options)
    return (loss * lse).sum()


def attention_inputs(seqlen: int = 9) -> list[Tensor]:
    shapes = ((2, seqlen, 4, 8), (2, seqlen, 2, 8), (2, seqlen, 2, 8), (1, 4, seqlen, seqlen), (4,))
    return [torch.randn(s, requires_grad=True) for s in shapes]


def loss_inputs(rows: int = 6) -> list[Tensor]:
    return [torch.randn(s, requires_grad=True) for s in ((rows, 8), (VOCAB, 8), (VOCAB,))]


FUNCTIONS = [
    pytest.param(attention_loss, attention_inputs, id="attention"),
    pytest.param(cross_entropy_loss, loss_inputs, id="cross_entropy"),
    pytest.param(linear_loss, loss_inputs, id="linear_cross_entropy"),
    pytest.param(linear_rows_loss, loss_inputs, id="linear_cross_entropy-rows"),
]
Loss = Callable[..., Tensor]
Inputs = Callable[..., list[Tensor]]


def value_and_grads(function: Loss, inputs: list[Tensor]) -> list[Tensor]:
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_all_equal(got: list[Tensor], expected: list[Tensor], exact: bool = True) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if exact else {}))


# --- compile and export ---------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "make_inputs"), FUNCTIONS)
def test_compiles_whole_with_gradients(function: Loss, make_inputs: Inputs) -> None:
    inputs = make_inputs()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_all_equal(value_and_grads(compiled, inputs), value_and_grads(function, inputs), False)
    with torch.no_grad():
        assert_all_equal([compiled(*inputs)], [function(*inputs)], False)
    with torch.inference_mode():
        assert_all_equal([compiled(*inputs)], [function(*inputs)], False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=public.name_of)
@pytest.mark.parametrize(("function", "make_inputs"), FUNCTIONS)
def test_the_reference_compiles(
    function: Loss, make_inputs: Inputs, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BACKEND", "reference")
    inputs = [t.detach().to(dtype).requires_grad_() for t in make_inputs()]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_all_equal(value_and_grads(compiled, inputs), value_and_grads(function, inputs), False)


def two_losses(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, w: Tensor) -> Tensor:
    x = fastattn.attention(q, k, v, bias=bias, sinks=sinks, causal=True).flatten(2)
    target = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    loss = fastattn.linear_cross_entropy(x.sin(), w, target)
    return loss + fastattn.cross_entropy(x.cos() @ w.T, target)


def test_compiles_with_inductor() -> None:
    inputs = [*attention_inputs(), torch.randn(VOCAB, 32, requires_grad=True)]
    compiled = torch.compile(two_losses, fullgraph=True)
    got, expected = value_and_grads(compiled, inputs), value_and_grads(two_losses, inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("function", "make_inputs"), FUNCTIONS)
def test_other_lengths_do_not_compile_again(function: Loss, make_inputs: Inputs) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for size in (9, 12, 20):
        inputs = make_inputs(size)
        assert_all_equal(
            value_and_grads(compiled, inputs), value_and_grads(function, inputs), False
        )
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_compiled_self_attention() -> None:
    """One tensor in three places, which Dynamo refuses in an autograd.Function."""

    def function(x: Tensor) -> Tensor:
        return fastattn.attention(x, x, x).square().sum()

    x = torch.randn(1, 5, 2, 8, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_all_equal(value_and_grads(compiled, [x]), value_and_grads(function, [x]), False)


def test_compiled_dropout_draws_its_seed_inside() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: Tensor) -> Tensor:
        return fastattn.attention(x, x, x, dropout_p=0.5)

    x = torch.randn(1, 16, 2, 8)
    first, second = function(x), function(x)
    assert not torch.equal(first, second)


def test_compiled_options_may_change() -> None:
    """Python numbers as arguments: window, softcap and scale of another value each time."""

    def function(x: Tensor, left: int, softcap: float, scale: float) -> Tensor:
        return fastattn.attention(x, x, x, window=(left, 0), softcap=softcap, scale=scale)

    x = torch.randn(1, 16, 2, 8)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for options in ((3, 2.0, 0.5), (5, 3.0, 0.7), (7, 4.0, 0.9)):
        torch.testing.assert_close(compiled(x, *options), function(x, *options))


@pytest.mark.parametrize("what", ["target", "linear-target", "offsets", "longest", "cache"])
def test_compiled_code_is_held_to_memory_safety(what: str) -> None:
    """What would send a kernel out of bounds is found inside the operators."""
    x = torch.randn(6, 4, 8)
    bad_target = torch.tensor([0, 1, 2, 3, 4, VOCAB])
    offsets = torch.tensor([0, 6 if what == "longest" else 7], dtype=torch.int32)
    lengths, cache = torch.tensor([5], dtype=torch.int32), torch.zeros(1, 4, 4, 8)
    calls: dict[str, tuple[Callable, tuple, type[Exception]]] = {
        "target": (fastattn.cross_entropy, (torch.randn(6, VOCAB), bad_target), IndexError),
        "linear-target": (
            fastattn.linear_cross_entropy,
            (torch.randn(6, 8), torch.randn(VOCAB, 8), bad_target),
            IndexError,
        ),
        "offsets": (fastattn.attention_varlen, (x, x, x, offsets, offsets, 9, 9), ValueError),
        "longest": (fastattn.attention_varlen, (x, x, x, offsets, offsets, 6, 5), ValueError),
        "cache": (
            lambda q, c, n: fastattn.attention_decode(q, c, c, cache_seqlens=n),
            (x[None, :1], cache, lengths),
            ValueError,
        ),
    }
    function, arguments, error = calls[what]
    with pytest.raises(error):
        function(*arguments)
    with pytest.raises(error):
        torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """A program for any length; it holds our operators, not a backend's."""

    class Exported(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, target: Tensor) -> Tensor:
            x = fastattn.attention(q, k, k, causal=True)
            return fastattn.cross_entropy(x.flatten(0, 2), target)

    def inputs(seqlen: int) -> tuple[Tensor, ...]:
        q, k = torch.randn(1, seqlen, 4, 8), torch.randn(1, seqlen, 2, 8)
        return q, k, torch.randint(8, (4 * seqlen,))

    seqlen = torch.export.Dim("seqlen", min=2, max=1024)
    shapes = ({1: seqlen}, {1: seqlen}, {0: 4 * seqlen})
    program = torch.export.export(Exported(), inputs(9), dynamic_shapes=shapes, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"fastattn.attn_fwd.default", "fastattn.cross_entropy_fwd.default"} <= targets
    other = inputs(17)
    torch.testing.assert_close(program.module()(*other), Exported()(*other))


# --- torch.func -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "make_inputs"), FUNCTIONS)
def test_func_grad(function: Loss, make_inputs: Inputs) -> None:
    inputs = make_inputs()
    got = grad(function, tuple(range(len(inputs))))(*(t.detach() for t in inputs))
    assert_all_equal(list(got), value_and_grads(function, inputs)[1:], False)


@pytest.mark.parametrize(("function", "make_inputs"), FUNCTIONS)
def test_vmap_of_grad_and_grad_of_vmap(function: Loss, make_inputs: Inputs) -> None:
    """Per-sample gradients: the first input mapped, the others shared."""
    samples = [make_inputs() for _ in range(3)]
    _, *shared = (t.detach() for t in samples[0])
    mapped = torch.stack([sample[0].detach() for sample in samples])
    in_dims = (0, *(None for _ in shared))
    expected = torch.stack(
        [
            value_and_grads(function, [x.requires_grad_(), *leaves(shared)])[1]
            for x in mapped.clone()
        ]
    )
    per_sample = vmap(grad(function), in_dims)(mapped, *shared)
    torch.testing.assert_close(per_sample, expected)
    summed = grad(lambda x: vmap(function, in_dims)(x, *shared).sum())(mapped)
    torch.testing.assert_close(summed, expected)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def test_vmap_over_any_dimension() -> None:
    q, k = torch.randn(2, 5, 3, 4, 8), torch.randn(3, 2, 5, 2, 8)  # 3 is mapped
    got = vmap(lambda q, k: fastattn.attention(q, k, k), (2, 0), 1)(q, k)
    expected = [fastattn.attention(q[:, :, i], k[i], k[i]) for i in range(3)]
    assert torch.equal(got, torch.stack(expected, 1))
    with pytest.raises(ValueError, match="dimension of size 0"):
        vmap(lambda q: fastattn.attention(q, q, q))(q[:0])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_with_dropout(randomness: str) -> None:
    x = torch.ones(2, 1, 16, 2, 8)
    function = vmap(lambda x: fastattn.attention(x, x, x, dropout_p=0.5), randomness=randomness)
    first, second = function(x)
    assert torch.equal(first, second) == (randomness == "same")


def test_batched_gradients() -> None:
    """jacrev, and autograd.grad with is_grads_batched, map the backward pass alone."""
    q, k, v = (torch.randn(1, 3, 1, 4) for _ in range(3))

    def function(q: Tensor) -> Tensor:
        return fastattn.attention(q, k, v)

    jacobian = torch.autograd.functional.jacobian(function, q)
    torch.testing.assert_close(jacrev(function)(q), jacobian)
    leaf = q.clone().requires_grad_()
    out = function(leaf)
    basis = torch.eye(out.numel()).view(out.numel(), *out.shape)
    (rows,) = torch.autograd.grad(out, leaf, basis, is_grads_batched=True)
    torch.testing.assert_close(rows.view_as(jacobian), jacobian)


@pytest.mark.parametrize(("function", "make_inputs"), FUNCTIONS)
def test_forward_mode_is_refused(function: Loss, make_inputs: Inputs) -> None:
    inputs = tuple(t.detach() for t in make_inputs())
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(function, inputs, inputs)


# --- grad modes, checkpointing --------------------------------------------------------------------


@pytest.mark.parametrize(("function", "make_inputs"), FUNCTIONS)
def test_without_grad(function: Loss, make_inputs: Inputs) -> None:
    inputs = make_inputs()
    expected = function(*inputs).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = function(*inputs)
        assert not loss.requires_grad
        torch.testing.assert_close(loss.clone(), expected)
    plain = function(*(t.detach() for t in inputs))
    assert plain.grad_fn is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(reentrant: bool) -> None:
    x = torch.randn(1, 16, 2, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return fastattn.attention(x, x, x, dropout_p=0.5)

    results = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        out = run(x)
        torch.randn(5)  # moves the generator on between the passes
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), x)] if not reentrant
                       else backward_by_accumulation(out, x))  # fmt: skip
    assert_all_equal(*results)


def backward_by_accumulation(out: Tensor, x: Tensor) -> list[Tensor]:
    """Re-entrant checkpoints know only backward(), not autograd.grad."""
    x.grad = None
    out.square().sum().backward()
    return [out.detach(), x.grad.clone()]


def test_deterministic_algorithms_are_enough() -> None:
    """deterministic=None follows torch's switch; either way the CPU gives the same bits."""
    inputs = attention_inputs()
    plain = value_and_grads(attention_loss, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        strict = value_and_grads(attention_loss, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_all_equal(plain, strict)


def test_raw_operators_check_their_targets() -> None:
    p = CrossEntropyProblem(torch.randn(2, VOCAB), torch.tensor([0, -1]))
    with pytest.raises(IndexError, match="target -1 is out of range for 33 classes"):
        torch.ops.fastattn.cross_entropy_fwd(*p, None)
