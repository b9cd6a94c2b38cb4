"""A GPT from one config: GPT-2 exactly, or a modern one, with attention and loss through fastattn.

    config = GPTConfig(vocab_size=65, block_size=256, n_layer=4, n_head=4, n_embd=128)
    model = GPT(config)
    loss = model(idx, targets)  # idx, targets (B, T) int64; the (B, T, V) logits never exist whole
    loss.backward()
    tokens = model.generate(idx, max_new_tokens=100, temperature=0.8)

Parameters have GPT-2's names (wte, wpe, h.0.ln_1, h.0.attn.c_attn, …); weights of linear layers are
(out, in). A tied head has no parameter of its own: it is wte.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import hf_gpt2
from .elementwise import Activation
from .generate import generate
from .linear import linear
from .losses import linear_cross_entropy
from .modules import (
    MLP,
    CausalSelfAttention,
    KVCache,
    LayerCache,
    NormName,
    RotaryEmbedding,
    TiedEmbedding,
    check_tokens,
    default_n_inner,
    make_norm,
)

PositionName = Literal["learned", "rope"]
# A training step holds most memory at its loss: half of what the loss takes by itself.
LOSS_WORKSPACE_BYTES = 64 << 20


@dataclass(frozen=True)
class GPTConfig:
    """The architecture; the defaults are GPT-2 small's. Raises ValueError for what can't be."""

    vocab_size: int = 50257  # V
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 12  # blocks
    n_head: int = 12  # query heads
    n_kv_head: int | None = None  # KV heads, a divisor of n_head; None = n_head
    n_embd: int = 768  # C, the width
    n_inner: int | None = None  # MLP width; None = 4 C, for swiglu 8/3 C
    norm: NormName = "layernorm"  # before attention, the MLP and the head
    norm_eps: float = 1e-5  # added to the variance
    mlp: Activation = "gelu"  # gelu in its tanh form; relu2 is ReLU squared
    position: PositionName = "learned"  # an embedding; or rope: queries and keys are rotated
    rope_base: float = 10000.0  # of the rotations' wavelengths
    qk_norm: bool = False  # RMS-normalise each query and key
    bias: bool = True  # in linear layers and LayerNorm
    tie_embeddings: bool = True  # the head's weight is wte's
    attn_softcap: float = 0.0  # 0 = none, on attention scores
    logit_softcap: float = 0.0  # 0 = none, on the head's logits
    window: int = -1  # keys visible to the left of each query; -1 = all
    dropout: float = 0.0  # of embeddings, attention weights and each block's two outputs
    init_std: float = 0.02  # of weights at the start
    eos_token_id: int | None = None  # where `generate` stops unless told otherwise

    def __post_init__(self) -> None:
        for name, choices in (("norm", NormName), ("mlp", Activation), ("position", PositionName)):
            value, allowed = getattr(self, name), get_args(choices)
            if value not in allowed:
                raise ValueError(f"GPTConfig: {name} must be one of {allowed}, got {value!r}")
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner")
        rates = ("attn_softcap", "logit_softcap", "norm_eps", "init_std")
        for names, least in ((sizes, 1), (rates, 0), (("window",), -1)):
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= least:
                    raise ValueError(f"GPTConfig: {name} must be at least {least}, got {value}")
        problem = None
        if self.n_embd % self.n_head:
            problem = f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}"
        elif self.n_head % self.kv_heads:
            problem = f"n_head {self.n_head} must be a multiple of n_kv_head {self.kv_heads}"
        elif self.head_dim > 256:
            problem = f"head dim n_embd / n_head is {self.head_dim}; attention takes at most 256"
        elif self.position == "rope" and self.head_dim % 2:
            problem = f"rope needs an even head dim n_embd / n_head, got {self.head_dim}"
        elif not 0 <= self.dropout < 1:
            problem = f"dropout must be in [0, 1), got {self.dropout}"
        if problem is not None:
            raise ValueError(f"GPTConfig: {problem}")

    @property
    def kv_heads(self) -> int:  # H_k
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def inner(self) -> int:
        return default_n_inner(self.mlp, self.n_embd) if self.n_inner is None else self.n_inner

    @property
    def head_dim(self) -> int:  # D
        return self.n_embd // self.n_head

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.float32) -> int:
        """What one token of one sequence takes in a KV cache: 2 · L · H_k · D · bytes a number."""
        return 2 * self.n_layer * self.kv_heads * self.head_dim * dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """Inverts `to_dict`. Absent keys take their defaults, unknown ones raise ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"GPTConfig: unknown key {key!r}{hint}")
        return cls(**values)


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c = config
        self.ln_1 = make_norm(c.norm, c.n_embd, eps=c.norm_eps, bias=c.bias)
        self.attn = CausalSelfAttention(
            c.n_embd,
            c.n_head,
            n_kv_head=c.n_kv_head,
            bias=c.bias,
            qk_norm=c.qk_norm,
            softcap=c.attn_softcap,
            window=c.window,
            dropout=c.dropout,
        )
        self.ln_2 = make_norm(c.norm, c.n_embd, eps=c.norm_eps, bias=c.bias)
        self.mlp = MLP(c.mlp, c.n_embd, c.inner, bias=c.bias, dropout=c.dropout)

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        rotation: Tensor | None = None,
        cache: LayerCache | None = None,
        backend: str | None = None,
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation, cache, backend)
        return x + self.mlp(self.ln_2(x), backend)


class GPT(nn.Module):
    """A decoder-only transformer with pre-normalised blocks.

    `activation_checkpointing = True` keeps only the blocks' inputs for the backward pass and
    computes the rest again: less memory for about a third more time.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        V, C = config.vocab_size, config.n_embd
        self.wte = nn.Embedding(V, C)
        self.wpe = nn.Embedding(config.block_size, C) if config.position == "learned" else None
        rope = config.position == "rope"
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_base) if rope else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config.norm, C, eps=config.norm_eps, bias=config.bias)
        self.lm_head = None if config.tie_embeddings else nn.Linear(C, V, bias=False)
        init_weights(self)

    @property
    def head_weight(self) -> Tensor:
        """(V, C)"""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self, idx: Tensor, cache: KVCache | None = None, *, backend: str | None = None
    ) -> Tensor:
        """idx (B, T) int64 gives what the head reads: (B, T, C), after the last norm.

        With a cache, the tokens follow those it holds, and are added to it.
        Raises ValueError if the context would be longer than block_size or than the cache.
        """
        check_tokens(idx)
        return self._transform(self.wte(idx), cache, backend)

    def _transform(self, x: Tensor, cache: KVCache | None, backend: str | None) -> Tensor:
        """Looked up tokens x (B, T, C) to the last norm's output (B, T, C)."""
        T = x.shape[1]
        context, limit = T, self.config.block_size
        if cache is not None:
            context, limit = T + cache.length, min(limit, cache.max_seqlen)
        if context > limit:
            raise ValueError(f"GPT: {context} tokens are more than the context of {limit}")

        positions = torch.arange(T, device=x.device)  # (T,)
        if cache is not None and cache.length > 0:
            positions = cache.seqlens[:, None] + positions  # (B, T)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        rotation = None if self.rotary is None else self.rotary(positions)

        x = self.drop(x)
        for i, block in enumerate(self.h):
            if cache is not None:
                x = block(x, rotation, cache.layer(i), backend)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, None, backend, use_reentrant=False)
            else:
                x = block(x, rotation, None, backend)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)

    def logits(self, hidden: Tensor, *, backend: str | None = None) -> Tensor:
        """hidden (…, C) gives logits (…, V)."""
        logits = linear(hidden, self.head_weight, backend=backend)
        softcap = self.config.logit_softcap
        return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> Tensor:
        """The logits (B, T, V) of tokens idx (B, T) int64, or, given targets (B, T), the loss.

        Targets of −100 are ignored. The loss is fp32: the mean over the others, their "sum", or
        with reduction "none" (B, T). `backend`, as in `attention`, is also for the loss and the
        matrix products.
        """
        if targets is None:
            return self.logits(self.hidden(idx, backend=backend), backend=backend)
        check_tokens(idx)
        if self.lm_head is not None or torch.compiler.is_compiling():
            x, head_weight = self.wte(idx), self.head_weight
        else:
            x, head_weight = TiedEmbedding.apply(idx, self.wte.weight)
        return linear_cross_entropy(
            self._transform(x, None, backend),
            head_weight,
            targets,
            softcap=self.config.logit_softcap,
            reduction=reduction,
            workspace_bytes=LOSS_WORKSPACE_BYTES,
            backend=backend,
        )

    generate = generate

    def new_cache(self, batch: int, max_seqlen: int | None = None) -> KVCache:
        """An empty cache for `batch` sequences of up to max_seqlen tokens (None: block_size).

        Its dtype is that of keys and values: the weights', or autocast's where that is on.
        """
        c, weight = self.config, self.wte.weight
        autocast = torch.is_autocast_enabled(weight.device.type)
        return KVCache(
            c.n_layer,
            batch,
            c.block_size if max_seqlen is None else max_seqlen,
            c.kv_heads,
            c.head_dim,
            dtype=torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype,
            device=weight.device,
        )

    def num_params(self, *, embeddings: bool = True) -> int:
        """All parameters; without embeddings, those a matrix product or a norm uses.

        Left out are then positions and an untied wte, which are only looked up. A tied wte is the
        head, so it counts.
        """
        total = sum(p.numel() for p in self.parameters())
        if not embeddings:
            total -= 0 if self.wpe is None else self.wpe.weight.numel()
            total -= 0 if self.lm_head is None else self.wte.weight.numel()
        return total

    def flops_per_token(self, seqlen: int) -> int:
        """FLOPs of training on one token of a sequence: 6 N + 12 · L · C · T.

        The convention of PaLM (Chowdhery et al., 2022, appendix B) and nanoGPT: N is
        `num_params(embeddings=False)`, and attention is counted whole, without the causal half.
        """
        c = self.config
        return 6 * self.num_params(embeddings=False) + 12 * c.n_layer * c.n_embd * seqlen

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dropout: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> GPT:
        """The model in `folder`, written by `save_pretrained` or, a GPT-2, by transformers.

        It is in eval mode. `dropout` replaces the stored rate. Nothing is downloaded.
        Raises FileNotFoundError or ValueError, saying what is not as it should be.
        """
        config = GPTConfig.from_dict(hf_gpt2.read_config(folder, dropout))
        with torch.device("meta"):  # no time for an initialisation that would be overwritten
            model = cls(config)
        model = model.to(dtype).to_empty(device=device).eval()
        hf_gpt2.read_weights(folder, dict(model.named_parameters()))
        return model

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 2**30
    ) -> None:
        """Writes the model to `folder`, made if absent, for `from_pretrained`.

        A GPT-2 is written so that transformers reads it, too. Weights beyond max_shard_bytes go to
        several files.
        """
        os.makedirs(folder, exist_ok=True)
        hf_gpt2.write_weights(folder, dict(self.named_parameters()), max_shard_bytes)
        hf_gpt2.write_config(folder, self.config.to_dict())


def init_weights(model: GPT) -> None:
    """GPT-2's initialisation: weights and embeddings N(0, init_std²), biases 0. Norms stay 1.

    The 2 L projections that add to the residual stream are smaller by √(2 L), so that it does not
    grow with depth (Radford et al., 2019).
    """
    std = model.config.init_std
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            residual = name.endswith("c_proj")
            scale = (2 * model.config.n_layer) ** -0.5 if residual else 1.0
            nn.init.normal_(module.weight, std=std * scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
