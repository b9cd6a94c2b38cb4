"""nn.MultiheadAttention on fastattn's kernels, and the replacement of those in a model.

The subclass has torch's parameters, so state dicts, optimizers and hooks stay as they are:
replacing a module is changing its class. It is `attention` between the projections; weights are
recomputed from lse only where `need_weights` asks for them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validate
from .attention import dense_problem, run, with_seed
from .weights import dropped_weights, whole_weights


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: its arguments, parameters and results.

    Two results differ, where torch's own paths disagree: a query whose keys are all masked gives 0
    (and weights 0), never NaN; and with `is_causal` the extra keys of add_bias_kv and add_zero_attn
    stay visible. A bool and a float mask may meet without a copy of either.
    """

    @functools.wraps(nn.MultiheadAttention.__init__)  # type: ignore[misc]
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _call_forward(self)

    def _reset_parameters(self) -> None:
        """As torch's, which asks what `_call_forward` changes; same seed, same numbers."""
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of projected queries over projected keys and values, projected.

        Args:
            query: (L, N, E), with batch_first (N, L, E), unbatched (L, E); key: likewise with S and
                kdim; value: with S and vdim.
            key_padding_mask: (N, S), unbatched (S,): bool, True = not attended to, or float, added.
            need_weights: also return the weights. Costs (N, H, L, S) memory, which nothing else
                here does.
            attn_mask: (L, S) or (N·H, L, S), bool or float likewise.
            average_attn_weights: average the weights over heads.
            is_causal: says that attn_mask is the causal mask, which is then not read.

        Returns:
            The output, laid out as the query; and the weights, after dropout: (N, L, S), or
            (N, H, L, S) if not averaged, or None.

        Raises:
            As `attention`; ValueError also for nested tensors, and for is_causal without attn_mask.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says what attn_mask is, so attn_mask must be given too")
        batched = _is_batched(query, key, value)
        batch_first = self.batch_first or not batched
        projected = self._project(query, key, value)
        q, k, v = (self._heads(t, batched, batch_first) for t in projected)
        k, v, extra = self._extra_keys(k, v)
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1] - extra

        padding, scores = key_padding_mask, attn_mask  # both to 4-D, broadcasting over (N, H, L, S)
        if padding is not None:
            padding = _shaped("key_padding_mask", padding, batched, (batch, seqlen_k))
            padding = padding[:, None, None]
        causal = is_causal and extra == 0 and seqlen_q == seqlen_k
        if causal:
            scores = None
        elif scores is not None:
            shapes = (seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k)
            scores = _shaped("attn_mask", scores, True, *shapes)
            scores = scores.view(*((batch, -1) if scores.dim() == 3 else (1, 1)), *shapes[0])
        mask, bias = _merge(padding, scores, extra)

        dropout_p = self.dropout if self.training else 0.0
        p = dense_problem(
            q, k, v, causal, (-1, -1), None, 0.0, mask, bias, None, None, dropout_p
        )  # fmt: skip
        p = with_seed(p)  # the weights are of the dropout that out has
        out, _ = run(p)
        out = out.flatten(2)  # (N, L, E)
        out = self.out_proj(out if batch_first else out.transpose(0, 1))
        out = out if batched else out.squeeze(0)
        if not need_weights:
            return out, None
        weights = dropped_weights(p, whole_weights(p)).to(out.dtype)
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (…, E), in as few products as the inputs allow."""
        w, b, embed = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if w is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if b is None else b.chunk(3)
            inputs = (query, key, value)
            return tuple(F.linear(*xwb) for xwb in zip(inputs, weights, biases, strict=True))
        if query is key and key is value:
            return F.linear(query, w, b).chunk(3, -1)
        w_q, w_kv = w.split((embed, 2 * embed))
        b_q, b_kv = (None, None) if b is None else b.split((embed, 2 * embed))
        q = F.linear(query, w_q, b_q)
        if key is value:
            return q, *F.linear(key, w_kv, b_kv).chunk(2, -1)
        w_k, w_v = w_kv.chunk(2)
        b_k, b_v = (None, None) if b_kv is None else b_kv.chunk(2)
        return q, F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)

    def _heads(self, t: Tensor, batched: bool, batch_first: bool) -> Tensor:
        """(…, E) as (N, S, H, D), a view."""
        t = t if batched else t.unsqueeze(0)
        t = t if batch_first else t.transpose(0, 1)
        return t.view(*t.shape[:2], self.num_heads, self.head_dim)

    def _extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v with bias_k and bias_v, and zeros, appended; and how many."""
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            shape = (k.shape[0], 1, *k.shape[2:])
            k, v = (
                torch.cat((t, bias.to(t.dtype).view(1, 1, *t.shape[2:]).expand(shape)), 1)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            extra += 1
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (k, v))
            extra += 1
        return k, v, extra


def _call_forward(module: nn.MultiheadAttention) -> None:
    """Make nn.TransformerEncoder(Layer) call the module.

    In eval mode they compute attention themselves from its weights, a subclass's too, unless they
    read here that these can't be used together.
    """
    module._qkv_same_embed_dim = False


def _is_batched(query: Tensor, key: Tensor, value: Tensor) -> bool:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if validate.tensor(name, t).is_nested:
            raise ValueError(
                f"{name} is a nested tensor, which nn.TransformerEncoder makes where its"
                " use_nested_tensor is True: set that to False (replace_modules does, for encoders"
                " inside the model it is given)"
            )
        if t.dim() != query.dim() or t.dim() not in (2, 3):
            raise ValueError(
                "query, key and value must all have 3 dimensions, or 2 unbatched;"
                f" {name} has shape {tuple(t.shape)}"
            )
    return query.dim() == 3


def _shaped(name: str, mask: Tensor, batched: bool, *allowed: tuple[int, ...]) -> Tensor:
    """The mask, with a batch dimension of 1 if there is none, if it has one of these shapes."""
    validate.tensor(name, mask)
    if not batched:
        mask = mask.unsqueeze(0)
    if tuple(mask.shape) not in allowed:
        names = " or ".join(str(shape if batched else shape[1:]) for shape in allowed)
        got = tuple(mask.shape if batched else mask.shape[1:])
        raise ValueError(f"{name} must have shape {names}, got {got}")
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"{name} must be bool or floating point, got {mask.dtype}")
    return mask


def _merge(
    padding: Tensor | None, scores: Tensor | None, extra: int
) -> tuple[Tensor | None, Tensor | None]:
    """What torch's masks say, as `attention`'s mask and bias: (·, ·, ·, S + extra) each."""
    mask = bias = None
    for given in (padding, scores):
        if given is None:
            continue
        given = F.pad(given, (0, extra)) if extra else given  # False, 0: extra keys are visible
        if given.dtype != torch.bool:
            bias = given if bias is None else bias + given
        elif mask is None:
            mask = ~given
        else:
            mask = mask & ~given
    return mask, bias


class Replacements(NamedTuple):
    """What `replace_modules` did; prints as a list."""

    replaced: tuple[str, ...]  # names of modules, as in named_modules
    kept: tuple[tuple[str, str], ...]  # name and reason

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}  fastattn.MultiheadAttention" for name in self.replaced]
        lines += [f"{name or '(the model)'}  kept: {reason}" for name, reason in self.kept]
        return "\n".join(lines)


def replace_modules(model: nn.Module) -> Replacements:
    """Every nn.MultiheadAttention in the model becomes fastattn's, in place.

    Parameters, hooks and state_dict stay the same. nn.TransformerEncoder and its layers, which in
    eval mode compute attention themselves from the module's weights, call it from now on.

    Returns:
        Names of the modules replaced, and of those kept with the reason: subclasses, which may
        compute something else, and head dims over 256. Print it.
    """
    replaced, kept = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention):
            if type(module) is not nn.MultiheadAttention:
                kept.append((name, f"a subclass, {type(module).__qualname__}"))
            elif module.head_dim > validate.MAX_HEAD_DIM:
                kept.append((name, f"head dim {module.head_dim}"))
            else:
                module.__class__ = MultiheadAttention
                _call_forward(module)
                replaced.append(name)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(module, MultiheadAttention) for module in encoder.modules()
        ):
            encoder.use_nested_tensor = False
    return Replacements(tuple(replaced), tuple(kept))
