"""fastattn.MultiheadAttention against torch's, on a grid of options, both passes."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import MultiheadAttention
from fastattn.attention import AttentionFunction
from fastattn.problem import AttentionProblem
from fastattn.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_reference

E, H, N, L, S = 12, 3, 2, 5, 7

CONSTRUCTORS = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "dims": {"kdim": 6, "vdim": 10},
    "dims-no-bias": {"kdim": 6, "vdim": 10, "bias": False, "batch_first": True},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True, "batch_first": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6},
}


def padding(kind: str) -> Tensor:
    hidden = torch.arange(S) >= torch.tensor([[S], [4]])
    return hidden if kind == "bool" else torch.zeros(N, S).masked_fill(hidden, -torch.inf)


def scores(kind: str, *shape: int) -> Tensor:
    if kind == "float":
        return torch.randn(shape)
    hidden = torch.rand(shape) > 0.7
    hidden[..., 0] = False  # a row that sees nothing is another matter
    return hidden


CALLS = {
    "plain": lambda: {},
    "padding": lambda: {"key_padding_mask": padding("bool")},
    "padding-float": lambda: {"key_padding_mask": padding("float")},
    "mask": lambda: {"attn_mask": scores("bool", L, S)},
    "mask-float": lambda: {"attn_mask": scores("float", L, S)},
    "mask-3d": lambda: {"attn_mask": scores("bool", N * H, L, S)},
    "mask-3d-float": lambda: {"attn_mask": scores("float", N * H, L, S)},
    "both": lambda: {
        "key_padding_mask": padding("bool"),
        "attn_mask": scores("bool", N * H, L, S),
    },
    "both-float": lambda: {
        "key_padding_mask": padding("float"),
        "attn_mask": scores("float", L, S),
    },
    "mixed": lambda: {"key_padding_mask": padding("bool"), "attn_mask": scores("float", L, S)},
}


def pair(**constructor) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's, of the same numbers."""
    ours = MultiheadAttention(E, H, **constructor)
    theirs = nn.MultiheadAttention(E, H, **constructor)
    for parameter in ours.parameters():  # biases begin as zeros, which would hide a mistake
        nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(m: nn.MultiheadAttention, shared: str = "") -> list[Tensor]:
    sizes = ((L, m.embed_dim), (S, m.kdim), (S, m.vdim))
    tensors = [torch.randn(length, N, size) for length, size in sizes]
    tensors = [t.transpose(0, 1).contiguous() if m.batch_first else t for t in tensors]
    if shared == "kv":
        tensors[2] = tensors[1]
    return [t.requires_grad_() for t in tensors]


def results(m: nn.MultiheadAttention, args: list[Tensor], **options) -> list[Tensor | None]:
    """out, weights, and the gradients of inputs and parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")  # of torch, for "mixed"
        out, weights = m(*args, **options)
    loss = out.square().sum()
    if weights is not None and weights.requires_grad:
        loss = loss + weights.square().sum()
    leaves = [*dict.fromkeys(args), *m.parameters()]
    return [out.detach(), weights, *torch.autograd.grad(loss, leaves)]


def assert_same(
    ours: nn.MultiheadAttention,
    theirs: nn.MultiheadAttention,
    args: list[Tensor],
    options: dict | None = None,
) -> None:
    """Our errors against torch's in float64 are within a small factor of torch's in float32.

    As in fastattn.testing, gradients have two yardsticks: torch's, and the reference's, which like
    ours recomputes the weights from a rounded lse. The worse of them counts.
    """
    options = options or {}
    wide = {id(t): t.detach().double().requires_grad_() for t in args}  # the same one, the same
    wide_options = {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in options.items()
    }
    ref64 = results(copy.deepcopy(theirs).double(), [wide[id(t)] for t in args], **wide_options)
    got, eager = results(ours, args, **options), results(theirs, args, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastattn.multihead_attention.run", recomputing_reference)
        recomputed = results(ours, args, **options)
    assert [t is None for t in got] == [t is None for t in eager]
    for number, (a, ref, b, c) in enumerate(zip(got, ref64, eager, recomputed, strict=True)):
        if a is None:
            continue
        if number < 2:  # out and weights
            assert_close_to_reference(a, ref, b, FORWARD_FACTOR, f"result {number}")
        else:
            worse = max(b, c, key=lambda x, ref=ref: float((x - ref).abs().max()))
            assert_close_to_reference(a, ref, worse, GRADIENT_FACTOR, f"result {number}")


def recomputing_reference(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    return AttentionFunction.run(*p, False, "reference")


WEIGHTS = [(False, True), (True, True), (True, False)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_is_torchs(constructor: str, call: str) -> None:
    """Each constructor with each call; what is asked of the weights goes round."""
    ours, theirs = pair(**CONSTRUCTORS[constructor])
    turn = list(CONSTRUCTORS).index(constructor) + list(CALLS).index(call)
    need, average = WEIGHTS[turn % len(WEIGHTS)]
    options = {"need_weights": need, "average_attn_weights": average, **CALLS[call]()}
    assert_same(ours, theirs, inputs(ours), options)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shared_inputs_are_projected_together(batch_first: bool, bias: bool) -> None:
    ours, theirs = pair(batch_first=batch_first, bias=bias)
    query, key, _ = inputs(ours)
    for args in ([query] * 3, [query, key, key]):
        assert_same(ours, theirs, args)


@pytest.mark.parametrize("call", ["plain", "padding", "padding-float", "mask", "mask-3d-float"])
@pytest.mark.parametrize("constructor", ["plain", "batch-first", "all"])
def test_unbatched(constructor: str, call: str) -> None:
    ours, theirs = pair(**CONSTRUCTORS[constructor])
    args = [
        t.select(0 if ours.batch_first else 1, 0).detach().requires_grad_() for t in inputs(ours)
    ]
    options = CALLS[call]()
    if "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"][1]
    if call.startswith("mask-3d"):
        options["attn_mask"] = options["attn_mask"][:H]
    for need, average in WEIGHTS[:2]:
        asked = {"need_weights": need, "average_attn_weights": average, **options}
        assert_same(ours, theirs, args, asked)


@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=list(CONSTRUCTORS))
@pytest.mark.parametrize("padded", [False, True])
def test_causal_hint(constructor: dict, padded: bool) -> None:
    """torch reads the mask with need_weights=True; without, it hides the extra keys."""
    ours, theirs = pair(**constructor)
    args = [t.narrow(1 if ours.batch_first else 0, 0, L).detach() for t in inputs(ours)]
    args = [t.requires_grad_() for t in args]
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    options = {"attn_mask": hidden, "is_causal": True}
    if padded:
        options["key_padding_mask"] = padding("bool")[:, :L]
    assert_same(ours, theirs, args, options)
    weighted, unweighted = (ours(*args, **options, need_weights=need)[0] for need in (True, False))
    assert torch.equal(weighted, unweighted)


def test_causal_hint_reads_no_mask() -> None:
    ours, _ = pair()
    x = torch.randn(L, N, E)
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    out, _ = ours(x, x, x, attn_mask=hidden, is_causal=True)
    unread, _ = ours(x, x, x, attn_mask=torch.zeros_like(hidden), is_causal=True)
    assert torch.equal(out, unread)


def test_a_query_without_keys_gives_zero() -> None:
    """Where torch gives NaN."""
    ours, theirs = pair(bias=False)
    args = inputs(ours)
    everything = torch.ones(N, S, dtype=torch.bool)
    out, weights, *grads = results(ours, args, key_padding_mask=everything)
    assert not out.any() and not weights.any()
    assert all(not g.any() for g in grads)
    assert theirs(*args, key_padding_mask=everything)[0].isnan().all()


def test_gradient_of_a_float_mask() -> None:
    ours, theirs = pair()
    args, mask = inputs(ours), torch.randn(N * H, L, S, requires_grad=True)
    grads = [
        torch.autograd.grad(m(*args, attn_mask=mask)[0].square().sum(), mask)[0]
        for m in (ours, theirs)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=2e-5)


# --- dropout, modes, dtypes -----------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Names of the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options, hiding",
    [
        ({}, []),
        ({"attn_mask": torch.zeros(L, L).bool()}, ["bitwise_not", "masked_fill"]),
        ({"attn_mask": torch.zeros(L, L)}, ["add", "eq", "masked_fill"]),
    ],
    ids=["plain", "mask", "mask-float"],
)
def test_weights_cost_their_own_operators_only(options: dict, hiding: list[str]) -> None:
    """A small call's time is the number of its operators."""
    m, x = MultiheadAttention(E, H).eval(), torch.randn(L, N, E)
    names = {}
    with torch.no_grad():
        for need_weights in (False, True):
            with Operators() as seen:
                m(x, x, x, need_weights=need_weights, **options)
            names[need_weights] = seen.names
    weights = ["clone", "clone", "bmm", "mul", *hiding, "_softmax", *hiding[-1:], "mean"]
    assert names[True] == names[False] + weights


def test_dropout_in_training_and_not_in_eval() -> None:
    ours, theirs = pair(dropout=0.5)
    args = inputs(ours)
    out, weights = ours(*args, average_attn_weights=False)
    dropped = (weights == 0).float().mean()
    assert 0.3 < float(dropped) < 0.7
    v = ours._heads(ours._project(*args)[2], True, False)
    again = torch.einsum("bhqk,bkhd->qbhd", weights, v).flatten(2)
    torch.testing.assert_close(out, ours.out_proj(again), rtol=1e-4, atol=2e-5)
    ours.eval(), theirs.eval()
    assert_same(ours, theirs, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = (m.to(dtype) for m in pair())
    args = [t.to(dtype) for t in inputs(ours)]
    for a, b in zip(ours(*args), theirs(*args), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(
            a, b, **({"rtol": 0.03, "atol": 0.03} if dtype.itemsize < 4 else {})
        )


def test_autocast() -> None:
    ours, theirs = pair(add_bias_kv=True)
    args = inputs(ours)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = ours(*args)
        expected, expected_weights = theirs(*args)
    assert out.dtype == expected.dtype and weights.dtype == expected_weights.dtype
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert ours.in_proj_weight.grad.dtype == torch.float32


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_whole(need_weights: bool) -> None:
    torch._dynamo.reset()
    ours, _ = pair()
    args = inputs(ours)
    options = {"need_weights": need_weights, "key_padding_mask": padding("bool")}
    expected = results(ours, args, **options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    out, weights = compiled(*args, **options)
    grads = torch.autograd.grad(out.square().sum(), args)
    torch.testing.assert_close(out, expected[0])
    if not need_weights:
        torch.testing.assert_close(list(grads), expected[2:5], rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(weights, expected[1])


# --- state and construction -----------------------------------------------------------------------


@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=list(CONSTRUCTORS))
def test_parameters_and_state_dict_are_torchs(constructor: dict) -> None:
    modules = []
    for kind in (MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(5)
        modules.append(kind(E, H, **constructor))
    ours, theirs = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)  # the same start from the same seed
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_parameters_can_be_reset() -> None:
    m = MultiheadAttention(E, H, add_bias_kv=True)
    before = [p.clone() for p in m.parameters()]
    m._reset_parameters()
    assert not torch.equal(before[0], m.in_proj_weight)


def test_device_and_dtype_of_the_constructor() -> None:
    m = MultiheadAttention(E, H, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in m.parameters()} == {("meta", torch.bfloat16)}
    with pytest.raises(AssertionError, match="divisible"):
        MultiheadAttention(E, 5)


def test_copies_and_pickles() -> None:
    ours, _ = pair()
    args = inputs(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(*args)[0], ours(*args)[0])


def test_bad_arguments() -> None:
    ours, _ = pair()
    q, k, v = inputs(ours)
    for options, message in (
        ({"is_causal": True}, "attn_mask must be given"),
        ({"key_padding_mask": torch.zeros(S, N)}, r"key_padding_mask must have shape \(2, 7\)"),
        ({"attn_mask": torch.zeros(S, L)}, r"attn_mask must have shape \(5, 7\) or \(6, 5, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(q, k, v, **options)
    with pytest.raises(TypeError, match="bool or floating point"):
        ours(q, k, v, attn_mask=torch.zeros(L, S, dtype=torch.int64))
    with pytest.raises(ValueError, match="must all have 3 dimensions"):
        ours(q, k[0], v)
    with pytest.raises(ValueError, match="use_nested_tensor"):
        ours(*3 * [torch.nested.nested_tensor([q[:, 0], q[:3, 1]])])


# --- replacement ----------------------------------------------------------------------------------


class Odd(nn.MultiheadAttention):
    pass


def test_replace_modules() -> None:
    model = nn.ModuleDict(
        {
            "transformer": nn.Transformer(E, H, 1, 1, 16, batch_first=True),
            "odd": Odd(E, H),
            "wide": nn.MultiheadAttention(512, 1),
            "ours": MultiheadAttention(E, H),
        }
    )
    parameters, state = list(model.parameters()), list(model.state_dict())
    done = fastattn.replace_modules(model)
    assert done.replaced == (
        "transformer.encoder.layers.0.self_attn",
        "transformer.decoder.layers.0.self_attn",
        "transformer.decoder.layers.0.multihead_attn",
    )
    assert dict(done.kept) == {"odd": "a subclass, Odd", "wide": "head dim 512"}
    assert "odd  kept: a subclass, Odd" in str(done)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state
    assert fastattn.replace_modules(model).replaced == ()
    alone = nn.MultiheadAttention(E, H)
    assert fastattn.replace_modules(alone).replaced == ("",) and type(alone) is MultiheadAttention


def calls_of(model: nn.Module) -> list[str]:
    """Fills as the model's attention modules are called, without a hook, which would be noticed."""
    called: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):

            def forward(*args, _name=name, _forward=module.forward, **kwargs):
                called.append(_name)
                return _forward(*args, **kwargs)

            module.forward = forward
    return called


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoders_call_it(training: bool, grad: bool, norm_first: bool) -> None:
    """In eval mode without gradients torch's would not."""
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2).train(training)
    x = torch.randn(N, S, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    for options in (
        {},
        {"src_key_padding_mask": padding("bool")},
        {"mask": causal, "is_causal": True},
        {"mask": causal, "src_key_padding_mask": padding("bool")},
    ):
        ours = copy.deepcopy(model)
        assert len(fastattn.replace_modules(ours).replaced) == 2
        called = calls_of(ours)
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, out = model(x, **options), ours(x, **options)
        assert called == ["layers.0.self_attn", "layers.1.self_attn"]
        seen = torch.ones(N, S, dtype=torch.bool)
        if "src_key_padding_mask" in options:
            seen = ~padding("bool")  # torch's fast path gives 0 for padded queries
        torch.testing.assert_close(out[seen], expected[seen], rtol=1e-4, atol=2e-5)


def test_an_encoder_made_of_ours() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layer.self_attn = MultiheadAttention(16, 4, batch_first=True)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        model = nn.TransformerEncoder(layer, 1).eval()
    called = calls_of(model)
    with torch.inference_mode():
        model(torch.randn(N, S, 16), src_key_padding_mask=padding("bool"))
    assert called == ["layers.0.self_attn"]


def test_hooks_and_a_training_step_survive() -> None:
    model = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    model.self_attn.register_forward_hook(lambda *_: seen.append(1))
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    fastattn.replace_modules(model)
    x, memory = torch.randn(N, L, 16), torch.randn(N, S, 16)
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        m(x, memory).square().mean().backward()
        o.step()
    assert seen
    for a, b in itertools.zip_longest(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
