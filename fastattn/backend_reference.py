"""The reference's row in the backend table. It takes everything."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .problem import AttentionProblem, CrossEntropyProblem, DecodeProblem


def unusable() -> None:
    return None


def refuses(p: AttentionProblem | DecodeProblem | CrossEntropyProblem) -> None:
    return None


attn_fwd = reference.attention
attn_decode = reference.attention_decode
cross_entropy_bwd = reference.cross_entropy_backward


def attn_bwd(
    p: AttentionProblem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    return reference.attention_backward(p, out, lse, dout, dlse)


def cross_entropy_fwd(
    p: CrossEntropyProblem, dloss: Tensor | None, dlogits: Tensor | None
) -> tuple[Tensor, Tensor]:
    loss, lse = reference.cross_entropy(p)
    if dlogits is not None:
        assert dloss is not None
        dlogits.copy_(reference.cross_entropy_backward(p, lse, dloss.expand(loss.shape), None))
    return loss, lse
