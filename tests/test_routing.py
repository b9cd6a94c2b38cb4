"""F.scaled_dot_product_attention routed through fastattn: what goes where, and the way back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import backends, routing

TORCHS = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch._dynamo.reset()
    routing._warn_once.cache_clear()
    yield
    routing._kernels_refuse.cache_clear()
    if F.scaled_dot_product_attention is not TORCHS:
        for routed in list(routing._routings):
            routed.restore()
        pytest.fail("still routed")


class Operators(TorchDispatchMode):
    """The names of operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def inputs(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape or (2, 4, 9, 16), dtype=dtype).requires_grad_(grad) for _ in range(3)]


def call(*args, **kwargs) -> Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


def with_grads(function, leaves: list[Tensor], *args, **kwargs) -> list[Tensor]:
    out = function(*args, **kwargs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


# --- what fastattn takes --------------------------------------------------------------------------

TAKEN = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.5},
    "bool": {"attn_mask": torch.randn(9, 9) > -1},
    "float": {"attn_mask": torch.randn(2, 1, 9, 9)},
    "gradient-of-mask": {"attn_mask": torch.randn(4, 9, 9, requires_grad=True)},
}


@pytest.mark.parametrize("options", TAKEN.values(), ids=list(TAKEN))
def test_results_are_torchs_and_operators_ours(options: dict) -> None:
    leaves = inputs()
    every = leaves + [t for t in options.values() if isinstance(t, Tensor) and t.requires_grad]
    expected = with_grads(call, every, *leaves, **options)
    with fastattn.sdpa() as routed, Operators() as operators:
        got = with_grads(call, every, *leaves, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert {"fastattn::attn_fwd", "fastattn::attn_bwd"} <= operators.names
    assert routed.fastattn == 1 and not routed.torch
    assert str(routed) == "fastattn  1 calls"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_groups(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 4, 9, 16, dtype=dtype), torch.randn(2, 2, 9, 16, dtype=dtype)
    expected = call(q.float(), k.float(), k.float(), enable_gqa=True)
    with fastattn.sdpa() as routed:
        out = call(q, k, k, enable_gqa=True)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    assert routed.fastattn == 1 and out.dtype == dtype


def test_dropout_and_parameters() -> None:
    q = nn.Parameter(torch.randn(1, 2, 64, 8))
    v = torch.eye(64).expand(1, 2, 64, 64)
    with fastattn.sdpa() as routed:
        weights = call(q, q, v, dropout_p=0.5)
    assert routed.fastattn == 1
    assert 0.4 < float((weights == 0).float().mean()) < 0.6


def test_autocast_and_inference_mode() -> None:
    q, k, v = inputs(grad=False)
    with fastattn.sdpa() as routed, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert call(q, k.bfloat16(), v).dtype == torch.bfloat16
    assert routed.fastattn == 1


def test_multihead_attention_and_the_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    expected = layer(x, memory)
    with fastattn.sdpa() as routed:
        torch.testing.assert_close(layer(x, memory), expected, rtol=1e-4, atol=1e-5)
    assert routed.fastattn == 2


def test_causal_biases_of_torch() -> None:
    """torch's own subclasses say what they mean, and end up here where they can."""
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    biases = (causal_upper_left(6, 9), causal_lower_right(6, 9))
    expected = [call(q, k, k, bias) for bias in biases]
    assert not torch.allclose(*expected)
    with fastattn.sdpa() as routed:
        got = [call(q, k, k, bias) for bias in biases]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert routed.fastattn == 2


# --- what it leaves to torch ----------------------------------------------------------------------


def jagged(*lengths: int) -> Tensor:
    parts = [torch.randn(n, 2, 8) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)


def left_calls() -> dict:
    q, k, v = inputs(2, 2, 5, 8, grad=False)
    wide = torch.randn(1, 1, 3, 300)
    q64 = q.double()
    nested = jagged(3, 5)
    vector = torch.randn(2, 2, 5, 8, device="meta")
    return {
        "dtype torch.float64": lambda: call(q64, q64, q64),
        "head dim not in": lambda: call(wide, wide, wide),
        "device meta": lambda: call(vector, vector, vector),
        "NestedTensor": lambda: call(nested, nested, nested),
        "torch.func": lambda: torch.func.vmap(call)(q, k, v),
        "forward-mode": lambda: forward_mode(q, k, v),
        "flash backend": lambda: math_only(q, k, v),
    }


def forward_mode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        return torch.autograd.forward_ad.unpack_dual(call(dual, k, v)).tangent


def math_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return call(q, k, v)


@pytest.mark.parametrize("reason", list(left_calls()))
def test_the_rest_is_torchs_and_says_so_once(reason: str) -> None:
    function = left_calls()[reason]
    expected = function()
    with fastattn.sdpa() as routed:
        with pytest.warns(UserWarning, match=f"leaves .* to torch: .*{reason}"):
            got = function()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".* leaves .* to torch")
            function()
    if not got.is_meta and not got.is_nested:
        torch.testing.assert_close(got, expected)
    assert routed.fastattn == 0
    (counted,) = routed.torch
    assert reason in counted and routed.torch[counted] >= 2
    assert f"calls: {counted}" in str(routed)


def test_a_second_backward_is_torchs_math() -> None:
    q, k, v = inputs(1, 1, 3, 4)
    with fastattn.sdpa(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = math_only(q, k, v)
        (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        dq.square().sum().backward()
    assert k.grad is not None


def test_errors_are_torchs() -> None:
    q = torch.randn(2, 2, 5, 8)
    calls = [
        (q, q.bfloat16(), q),
        (q, q, q, torch.ones(5, 5, dtype=torch.int64)),
        (q[0, 0, 0],) * 3,
    ]
    for args in calls:
        with pytest.raises(Exception) as theirs:
            call(*args)
        with fastattn.sdpa(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(type(theirs.value)) as ours:
                call(*args)
        assert str(ours.value) == str(theirs.value)


def test_without_kernels_everything_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference would be slower than what is being replaced."""
    monkeypatch.setattr("fastattn.backends.TABLE", [r for r in backends.TABLE if r.name != "cpu"])
    routing._kernels_refuse.cache_clear()
    q, k, v = inputs()
    with fastattn.sdpa() as routed, pytest.warns(UserWarning, match="no kernel takes it"):
        call(q, k, v)
    routing._kernels_refuse.cache_clear()
    assert routed.fastattn == 0


def test_a_backend_asked_for_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "cuda")
    with fastattn.sdpa(), pytest.raises(RuntimeError, match="backend='cuda' can't take"):
        call(*inputs(grad=False))


# --- in force and restored ------------------------------------------------------------------------


def test_nested_routings_count_each_and_restore_last() -> None:
    q, k, v = inputs()
    outer = fastattn.replace_sdpa()
    with fastattn.sdpa() as inner:
        call(q, k, v)
    call(q, k, v)
    assert (outer.fastattn, inner.fastattn) == (2, 1)
    outer.restore()
    outer.restore()  # changes nothing
    assert F.scaled_dot_product_attention is TORCHS
    call(q, k, v)
    assert outer.fastattn == 2


def test_what_was_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone else's replacement too, which also gets the calls that we leave."""
    left = []

    def theirs(*args, **kwargs):
        left.append(args)
        return TORCHS(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    with fastattn.sdpa(), pytest.warns(UserWarning):
        call(*inputs(dtype=torch.float64))
    assert len(left) == 1 and F.scaled_dot_product_attention is theirs
    routed = fastattn.replace_sdpa()
    ours = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = theirs
    with pytest.raises(RuntimeError, match="replaced again"):
        routed.restore()
    F.scaled_dot_product_attention = ours
    routed.restore()


def test_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), fastattn.sdpa():
        raise ZeroDivisionError


def test_as_a_decorator() -> None:
    decorated = fastattn.sdpa()(lambda: F.scaled_dot_product_attention is TORCHS)
    assert not decorated() and not decorated()


# --- compiled -------------------------------------------------------------------------------------


class Compiler:
    """A backend of torch.compile that notes the operators of the graphs it gets."""

    def __init__(self) -> None:
        self.graphs: list[set[str]] = []

    def __call__(self, module, example_inputs):
        return aot_autograd(fw_compiler=self.note)(module, example_inputs)

    def note(self, module, example_inputs):
        self.graphs.append({str(node.target) for node in module.graph.nodes})
        return make_boxed_func(module.forward)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_is_routed_and_restored(dynamic: bool) -> None:
    leaves = inputs()
    compiler = Compiler()
    compiled = torch.compile(call, fullgraph=True, backend=compiler, dynamic=dynamic)
    expected = with_grads(compiled, leaves, *leaves, is_causal=True)
    with fastattn.sdpa() as routed:
        got = with_grads(compiled, leaves, *leaves, is_causal=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    forward, _, routed_forward, routed_backward = compiler.graphs
    assert "fastattn.attn_fwd.default" in routed_forward - forward
    assert "fastattn.attn_bwd.default" in routed_backward
    assert routed.fastattn >= 1
    for graphs in (6, 6):  # another call without, which is compiled no more, and one with
        torch.testing.assert_close(compiled(*leaves, is_causal=True), expected[0])
        with fastattn.sdpa():
            compiled(*leaves, is_causal=True)
        assert len(compiler.graphs) <= graphs


@pytest.mark.parametrize("options", TAKEN.values(), ids=list(TAKEN))
def test_compiled_results(options: dict) -> None:
    leaves = inputs()
    every = leaves + [t for t in options.values() if isinstance(t, Tensor) and t.requires_grad]
    expected = with_grads(call, every, *leaves, **options)
    with fastattn.sdpa():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        got = with_grads(compiled, every, *leaves, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_compiled_calls_that_are_left_to_torch() -> None:
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    with fastattn.sdpa() as routed:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        with pytest.warns(UserWarning, match="float64"):
            got = compiled(q, q, q)
    torch.testing.assert_close(got, call(q, q, q))
    assert routed.torch["dtype torch.float64"] >= 1 and routed.fastattn == 0


@pytest.mark.parametrize("strict", [False, True])
def test_exported_code_is_routed(strict: bool) -> None:
    class Exported(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 5, 8)
    with fastattn.sdpa():
        program = torch.export.export(Exported(), (q,), strict=strict)
    assert "fastattn.attn_fwd.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(q), call(q, q, q), rtol=1e-4, atol=1e-5)


def test_scripted_code_keeps_torchs() -> None:
    module = nn.MultiheadAttention(8, 2)
    x = torch.randn(5, 1, 8)
    with fastattn.sdpa() as routed, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(module)
        out, _ = scripted(x, x, x, need_weights=False)
        assert routed.fastattn == 0
        torch.testing.assert_close(out, module(x, x, x, need_weights=False)[0])
