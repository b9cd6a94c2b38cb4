"""The parts of a GPT: attention, rotary embedding, norms, MLPs and the cache of keys and values.

Shapes: B batch, T tokens, C = n_embd, H_q query heads on H_k KV heads of dimension D.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .decode import attention_decode
from .elementwise import Activation, activation_linear, rms_norm
from .linear import Linear

NormName = Literal["layernorm", "rmsnorm"]


def make_norm(name: NormName, size: int, *, eps: float = 1e-5, bias: bool = True) -> nn.Module:
    """LayerNorm (Ba et al., 2016), or RMSNorm (Zhang & Sennrich, 2019), which never has a bias."""
    if name == "layernorm":
        return nn.LayerNorm(size, eps=eps, bias=bias)
    return RMSNorm(size, eps=eps)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis, of `size` elements, with a learnt weight."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class TiedEmbedding(torch.autograd.Function):
    """idx (B, T) and the weight (V, C) give x (B, T, C), looked up, and the weight for the head.

    A tied weight has a dense gradient (V, C) from the head already; here the lookup's B·T rows are
    added into it. Autograd alone would fill another (V, C) with zeros and add both into a third:
    at V = 50257, T = 1024 these are 3 % of a training step's time, and memory of twice the weight.
    """

    @staticmethod
    def forward(idx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, dx: Tensor, dweight: Tensor) -> tuple[None, Tensor]:
        (idx,) = ctx.saved_tensors
        # In place: the head, dweight's only source, has no use for it any more.
        return None, dweight.index_add_(0, idx.flatten(), dx.flatten(0, 1).to(dweight.dtype))


class RotaryEmbedding(nn.Module):
    """Rotary position embedding: the pair (x_2i, x_2i+1) turns by position · base^(−2i/D).

    Su et al., "RoFormer", 2021. The rotations are computed at every call, once for all layers of
    a model: cheap, good for any position, and no buffer that a cast of the model could coarsen.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"RotaryEmbedding: head_dim must be even, got {head_dim}")
        self.head_dim = head_dim
        self.base = base

    def forward(self, positions: Tensor) -> Tensor:
        """Positions (…, T) of any integer dtype give unit complex64 numbers (…, T, 1, D/2)."""
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device) / self.head_dim
        angle = positions[..., None, None] * self.base**-exponent
        return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (B, T, H, D) turned by `rotation` (T | B, T, 1, D/2) of `RotaryEmbedding`, in x's dtype.

    One complex multiplication: on the CPU 2.5 times as fast as products and sums of halves.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


class LayerCache:
    """One layer's share of a `KVCache`."""

    def __init__(self, k: Tensor, v: Tensor, seqlens: Tensor, is_empty: bool) -> None:
        self.k = k  # (B, S_max, H_k, D)
        self.v = v  # (B, S_max, H_k, D)
        self.seqlens = seqlens  # (B,) int32: tokens in each row before this call
        self.is_empty = is_empty  # no row has a token: known on the host, without a sync


class KVCache:
    """The keys and values of all tokens seen so far, for every layer of a model, filled in place.

    Row b holds its tokens at 0 … seqlens[b] − 1, so rows of different length need no mask.
    """

    def __init__(
        self,
        n_layer: int,
        batch: int,
        max_seqlen: int,
        n_kv_head: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (n_layer, batch, max_seqlen, n_kv_head, head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.max_seqlen = max_seqlen
        self.length = 0  # the longest row's tokens, on the host

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self.k[index], self.v[index], self.seqlens, self.length == 0)

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more in every row, once all layers have stored them."""
        self.seqlens += tokens
        self.length += tokens

    def truncate(self, lengths: list[int]) -> None:
        """Forgets what row b holds behind its first lengths[b] tokens, such as padding."""
        self.seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.length = max(lengths)


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention over x (B, T, C), on the packed projection, through fastattn.

    `c_attn` projects to H_q query, then H_k key, then H_k value heads; attention reads them where
    they lie. Parameters have GPT-2's names.

    Args:
        n_embd: C; must be a multiple of n_head. D = C / H_q is at most 256.
        n_head, n_kv_head: H_q, and H_k dividing it (grouped-query attention); None means H_q.
        bias: whether both projections have one.
        qk_norm: divide each query and key by its root mean square before the rotary embedding.
        softcap: scores become softcap · tanh(score / softcap); 0 = off.
        window: keys visible to the left of a query, besides its own; −1 = all.
        dropout: probability for attention weights and for the output, when training.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        *,
        n_kv_head: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        softcap: float = 0.0,
        window: int = -1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if n_embd % n_head or n_head % n_kv_head:
            raise ValueError(
                "CausalSelfAttention: n_kv_head must divide n_head, and n_head n_embd; got "
                f"n_embd={n_embd}, n_head={n_head}, n_kv_head={n_kv_head}"
            )
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.head_dim = n_embd // n_head
        self.qk_norm = qk_norm
        self.softcap = softcap
        self.window = window
        self.dropout = dropout
        self.c_attn = Linear(n_embd, (n_head + 2 * n_kv_head) * self.head_dim, bias=bias)
        self.c_proj = Linear(n_embd, n_embd, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        cache: LayerCache | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """x (B, T, C) gives (B, T, C).

        `rotation` is what `RotaryEmbedding` returns for the tokens' positions. With a cache, the
        tokens follow those it holds and their keys and values are added to it.
        """
        B, T, _ = x.shape
        H_q, H_k = self.n_head, self.n_kv_head
        qkv = self.c_attn(x, backend).view(B, T, H_q + 2 * H_k, self.head_dim)
        if self.qk_norm or rotation is not None:
            qk, v = qkv.split((H_q + H_k, H_k), dim=2)
            if self.qk_norm:
                qk = rms_norm(qk)
            if rotation is not None:
                qk = rotate(qk, rotation)
            q, k = qk.split((H_q, H_k), dim=2)
        else:
            q, k, v = qkv.split((H_q, H_k, H_k), dim=2)

        y = self._attend(q, k, v, cache, backend)  # (B, T, H_q, D)
        return self.resid_dropout(self.c_proj(y.flatten(2), backend))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, backend: str | None
    ) -> Tensor:
        window, softcap = (self.window, 0), self.softcap
        if cache is not None and not cache.is_empty:
            return attention_decode(
                *(q, cache.k, cache.v),
                cache_seqlens=cache.seqlens,
                k=k,
                v=v,
                causal=True,
                window=window,
                softcap=softcap,
                backend=backend,
            )
        if cache is not None:
            T = k.shape[1]
            cache.k[:, :T], cache.v[:, :T] = k, v
        dropout_p = self.dropout if self.training else 0.0
        return attention(
            *(q, k, v),
            causal=True,
            window=window,
            softcap=softcap,
            dropout_p=dropout_p,
            backend=backend,
        )


class MLP(nn.Module):
    """The position-wise network C → n_inner → C.

    "gelu" is GPT-2's (the tanh form), "relu2" squares a ReLU (So et al., "Primer", 2021), and
    "swiglu" multiplies n_inner values by the SiLU of n_inner gates (Shazeer, 2020); its c_fc
    projects to the gates, then the values.
    """

    def __init__(
        self,
        name: Activation,
        n_embd: int,
        n_inner: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.name = name
        self.c_fc = Linear(n_embd, 2 * n_inner if name == "swiglu" else n_inner, bias=bias)
        self.c_proj = Linear(n_inner, n_embd, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        h, proj = self.c_fc(x, backend), self.c_proj
        y = activation_linear(self.name, h, proj.weight, proj.bias, backend=backend)
        return self.dropout(y)


def default_n_inner(name: Activation, n_embd: int) -> int:
    """4 C; for swiglu 8/3 C, which has the same parameters, rounded up to a multiple of 32."""
    return 32 * math.ceil(n_embd / 12) if name == "swiglu" else 4 * n_embd


def check_tokens(idx: Tensor) -> None:
    """Raises TypeError unless idx is (B, T) int64."""
    if not isinstance(idx, Tensor) or idx.dim() != 2 or idx.dtype != torch.int64:
        got = f"{idx.dtype} {tuple(idx.shape)}" if isinstance(idx, Tensor) else type(idx).__name__
        raise TypeError(f"idx must be a (B, T) int64 tensor of token ids, got {got}")
