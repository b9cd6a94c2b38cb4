"""The attention function that `register` puts under transformers' models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import attention, attention_decode, attention_varlen, attention_weights
from ...attention import autocast
from ...autograd import wants_gradient
from .masks import Packed, Visible, said_by


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Packed | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = None,
    cache: Any = None,
    head_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface.

    Args:
        module: the layer; its `is_causal` holds where the argument is None.
        query: (B, H_q, S_q, D); key: (B, H_k, S_k, D); value: (B, H_k, S_k, D_v): KV heads are not
            repeated.
        attention_mask: what `masks.attention_mask` made, or a user's 4-D mask, bool (True = attend)
            or float (added). A tensor is complete: neither causality nor a window comes on top.
            With None a causal layer is causal, aligned top-left as sdpa: keys past the queries,
            which a static cache has, are not seen. A single query sees all keys.
        sliding_window: for `cu_seq_lens_*`; masks bring their own.
        s_aux: (H_q,), the sinks. position_bias: (1 or B, H_q, S_q, S_k), added to the scores.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: of packed sequences, as the
            flattening data collator gives them, all or none; they stand in place of a mask.

    Returns:
        (B, S_q, H_q, D_v), contiguous; and with `output_attentions`, if sequences are not packed,
        the weights before dropout, (B, H_q, S_q, S_k), which cost their size, else None.

    Raises:
        ValueError: a head mask, a paged cache or weights of packed sequences are asked for; a mask
            is neither 4-D nor of the keys' length; padding comes with packed sequences; and as
            fastattn.attention.
    """
    _refuse(head_mask=head_mask, cache=cache)
    q, k, v = (t.transpose(1, 2) for t in autocast(query, key, value))  # (B, S, H, D)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    seen = said_by(attention_mask)
    if cu_seq_lens_q is not None:
        window = _packed_window(seen, causal, sliding_window)
        if cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
            raise ValueError("cu_seq_lens_q needs cu_seq_lens_k, max_length_q and max_length_k too")
        seen = Packed((cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k), window)
    if isinstance(seen, Packed):
        _refuse(position_bias=position_bias, output_attentions=output_attentions or None)
        return _packed(q, k, v, seen, dropout_p=dropout, **options), None
    bias = _up_to(k.shape[1], position_bias)
    if isinstance(seen, Tensor):
        options["mask"], options["bias"] = _dense(seen[..., : k.shape[1]], bias)
    else:
        if seen is None:
            causal = causal and q.shape[1] > 1
            if causal and k.shape[1] > q.shape[1]:  # top-left, as sdpa: a static cache's prefill
                k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
                bias = _up_to(q.shape[1], bias)
            seen = Visible(k.shape[1], k.shape[1], (-1, 0 if causal else -1))
        elif seen.kv_length != k.shape[1]:
            raise ValueError(
                f"the mask was made for {seen.kv_length} keys, but this layer has {k.shape[1]}"
            )
        options["window"] = seen.window
        wanted = dropout or output_attentions or wants_gradient(q, k, v, s_aux)
        if q.shape[1] == 1 and seen.keys is None and bias is None and not wanted:
            return _decode(q, k, v, seen, **options), None
        if isinstance(attention_mask, Tensor) and torch.compiler.is_compiling():
            del options["window"]  # compiled code doesn't know the end
            options["mask"], options["bias"] = _dense(attention_mask[..., : k.shape[1]], bias)
        else:
            k, v, bias = k[:, : seen.end], v[:, : seen.end], _up_to(seen.end, bias)
            options["mask"], options["bias"] = _mask(seen, q.device), bias
    if not output_attentions:
        return attention(q, k, v, dropout_p=dropout, **options), None
    out, lse = attention(q, k, v, dropout_p=dropout, return_lse=True, **options)
    return out, attention_weights(q, k, lse, **options).to(q.dtype)


def _up_to(length: int, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[..., :length]


def _mask(seen: Visible, device: torch.device) -> Tensor | None:
    """(B, 1, 1, end), of what is no padding."""
    keys = seen.keys
    if seen.left_padding is not None:
        keys = torch.arange(seen.end, device=device) >= seen.left_padding[:, None]
    return None if keys is None else keys[:, None, None, :]


def _decode(q: Tensor, k: Tensor, v: Tensor, seen: Visible, **options: Any) -> Tensor:
    """One query a sequence."""
    lengths = seen.lengths
    if lengths is None:
        lengths = torch.full((q.shape[0],), seen.end, dtype=torch.int32, device=q.device)
    return attention_decode(
        q, k, v, cache_seqlens=lengths, cache_leftpad=seen.left_padding, **options
    )


def _packed(q: Tensor, k: Tensor, v: Tensor, seen: Packed, **options: Any) -> Tensor:
    """Rows of the batch are laid one after the other."""
    cu_seqlens_q, cu_seqlens_k = (t.int() for t in seen.cu_seqlens)
    out = attention_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q, cu_seqlens_k,
        *seen.max_seqlens, window=seen.window, **options,
    )  # fmt: skip
    return out.unflatten(0, q.shape[:2])


def _packed_window(
    seen: Visible | Packed | Tensor | None, causal: bool, sliding_window: int | None
) -> tuple[int, int]:
    """The window inside sequences whose offsets the caller gave, with the mask of the layer."""
    if isinstance(seen, Visible):
        if seen.keys is not None or seen.left_padding is not None:
            raise ValueError("attention_mask has padding, but cu_seq_lens_q says there is none")
        return seen.window
    if isinstance(seen, Packed):
        return seen.window
    if seen is not None and not torch.compiler.is_compiling():  # which makes position_ids a mask
        raise ValueError("attention_mask and cu_seq_lens_q can't both be given")
    left = -1 if sliding_window is None else sliding_window - causal
    return left, 0 if causal else left


def _dense(given: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(mask, bias) of a complete mask, bool or float, and a bias."""
    if given.dim() != 4:
        raise ValueError(
            f"attention_mask must be 4-D when it reaches a layer, got {given.dim()} dimensions:"
            " this model makes no mask of it for attn_implementation='fastattn'"
        )
    if given.dtype == torch.bool:
        return given, bias
    return None, given if bias is None else given + bias


_REFUSALS = {
    "head_mask": "heads can't be switched off",
    "cache": "there is no paged cache of continuous batching",
    "position_bias": "packed sequences have no biases",
    "output_attentions": "packed sequences have no matrix of weights",
}


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name} can't be had with attn_implementation='fastattn': {_REFUSALS[name]};"
                " model.set_attn_implementation('eager') may do it"
            )
