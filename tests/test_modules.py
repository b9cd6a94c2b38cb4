"""The GPT's parts against formulas written out, and the KV cache against no cache."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastattn.modules import (
    MLP,
    CausalSelfAttention,
    KVCache,
    RotaryEmbedding,
    default_n_inner,
    make_norm,
    rotate,
)


def textbook_attention(module, x, rotation=None):
    """The attention module by torch's own functions, head by head, with an explicit mask."""
    B, T, _ = x.shape
    H_q, H_k, D = module.n_head, module.n_kv_head, module.head_dim
    q, k, v = module.c_attn(x).view(B, T, -1, D).split((H_q, H_k, H_k), dim=2)
    if module.qk_norm:
        q, k = (t * (t.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for t in (q, k))
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    visible = distance >= 0
    if module.window >= 0:
        visible &= distance <= module.window
    heads = []
    for h in range(H_q):
        kv = h // (H_q // H_k)
        scores = q[:, :, h] @ k[:, :, kv].mT / math.sqrt(D)
        if module.softcap > 0:
            scores = module.softcap * torch.tanh(scores / module.softcap)
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, :, kv])
    return module.c_proj(torch.cat(heads, dim=-1))


ATTENTIONS = {
    "plain": {},
    "gqa": {"n_kv_head": 2, "bias": False},
    "qk_norm": {"qk_norm": True},
    "softcap": {"softcap": 1.5},
    "window": {"window": 3},
    "all": {"n_kv_head": 1, "bias": False, "qk_norm": True, "softcap": 2.0, "window": 4},
}


@pytest.mark.parametrize("rope", [False, True], ids=["nope", "rope"])
@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_is_the_textbook_formula(options, rope):
    module = CausalSelfAttention(40, 4, **options)
    x = torch.randn(2, 11, 40, requires_grad=True)
    rotation = RotaryEmbedding(10)(torch.arange(11)) if rope else None
    got, want = module(x, rotation), textbook_attention(module, x, rotation)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    dout = torch.randn_like(want)
    leaves = [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, leaves, dout),
        torch.autograd.grad(want, leaves, dout),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_cached_attention_is_the_uncached(options):
    """Prefill of rows of different length, then single tokens, then three at once."""
    module = CausalSelfAttention(40, 4, **options).eval()
    rope = RotaryEmbedding(10)
    x = torch.randn(2, 14, 40)
    whole = module(x, rope(torch.arange(14)))
    cache = KVCache(1, 2, 16, module.n_kv_head, 10)
    prompt = [5, 7]
    with torch.no_grad():
        out = module(x[:, :7], rope(torch.arange(7)), cache.layer(0))
        cache.advance(7)
        cache.truncate(prompt)
        for b in range(2):
            torch.testing.assert_close(out[b, : prompt[b]], whole[b, : prompt[b]])
        for tokens in (1, 1, 3):
            positions = cache.seqlens[:, None] + torch.arange(tokens)  # (B, T)
            new = torch.stack([x[b, positions[b]] for b in range(2)])
            out = module(new, rope(positions), cache.layer(0))
            want = torch.stack([whole[b, positions[b]] for b in range(2)])
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
            cache.advance(tokens)
    assert cache.seqlens.tolist() == [10, 12] and cache.length == 12


def test_attention_dropout_only_when_training():
    module = CausalSelfAttention(32, 2, dropout=0.5)
    module.resid_dropout.p = 0.0
    x = torch.randn(1, 6, 32)
    torch.testing.assert_close(module.eval()(x), textbook_attention(module, x))
    module.train()
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(first, module(x))
    assert not torch.allclose(first, module(x))


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="n_head=5"):
        CausalSelfAttention(32, 5)
    with pytest.raises(ValueError, match="n_kv_head=3"):
        CausalSelfAttention(32, 4, n_kv_head=3)


def test_rotation_turns_pairs_by_their_angle():
    rope, D, position = RotaryEmbedding(8, base=100.0), 8, 37
    x = torch.randn(1, 1, 3, D)
    y = rotate(x, rope(torch.tensor([position])))
    for i in range(D // 2):
        angle = position * 100.0 ** (-2 * i / D)
        a, b = x[..., 2 * i], x[..., 2 * i + 1]
        want = a * math.cos(angle) - b * math.sin(angle)
        torch.testing.assert_close(y[..., 2 * i], want, rtol=1e-5, atol=1e-5)
        want = a * math.sin(angle) + b * math.cos(angle)
        torch.testing.assert_close(y[..., 2 * i + 1], want, rtol=1e-5, atol=1e-5)


def test_rotated_products_depend_on_distance_alone():
    rope = RotaryEmbedding(16)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def product(i, j):
        return (rotate(q, rope(torch.tensor([i]))) * rotate(k, rope(torch.tensor([j])))).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(product(9, 4), product(9, 5))


def test_rotation_keeps_dtype_and_takes_positions_of_each_row():
    rope = RotaryEmbedding(4)
    positions = torch.tensor([[3, 4], [8, 9]])
    x = torch.randn(2, 2, 1, 4)
    together = rotate(x, rope(positions))
    for b in range(2):
        torch.testing.assert_close(together[b : b + 1], rotate(x[b : b + 1], rope(positions[b])))
    assert rotate(x.bfloat16(), rope(positions)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="even"):
        RotaryEmbedding(5)


def test_mlps_are_their_formulas():
    x = torch.randn(3, 5, 12)
    gelu, relu2, swiglu = (MLP(name, 12, 20) for name in ("gelu", "relu2", "swiglu"))
    h = gelu.c_fc(x)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(gelu(x), gelu.c_proj(h))
    h = relu2.c_fc(x).clamp(min=0) ** 2
    torch.testing.assert_close(relu2(x), relu2.c_proj(h))
    gate = F.linear(x, *(p[:20] for p in swiglu.c_fc.parameters()))
    value = F.linear(x, *(p[20:] for p in swiglu.c_fc.parameters()))
    torch.testing.assert_close(swiglu(x), swiglu.c_proj(gate * gate.sigmoid() * value))


def test_default_widths_have_like_parameter_counts():
    assert default_n_inner("gelu", 768) == default_n_inner("relu2", 768) == 3072
    assert default_n_inner("swiglu", 768) == 2048
    assert default_n_inner("swiglu", 100) == 288  # 8/3 · 100 = 266.7, rounded up


def test_norms():
    x = torch.randn(4, 24) + 1
    layer, rms = make_norm("layernorm", 24), make_norm("rmsnorm", 24)
    centred = x - x.mean(-1, keepdim=True)
    var = centred.square().mean(-1, keepdim=True)
    torch.testing.assert_close(layer(x), centred / (var + 1e-5).sqrt())
    mean_square = x.square().mean(-1, keepdim=True)
    torch.testing.assert_close(rms(x), x / (mean_square + 1e-5).sqrt())
    assert make_norm("layernorm", 24, bias=False).bias is None
