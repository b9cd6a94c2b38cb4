"""The reference's row in the backend table. It takes everything."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .backends import Problem
from .problem import AttentionProblem, CrossEntropyProblem, QKVGradients


def unusable() -> None:
    return None


def refuses(p: Problem, asked: bool) -> None:
    return None


attn_fwd = reference.attention
attn_entropy = reference.attention_entropy
attn_decode = reference.attention_decode


def attn_bwd(
    p: AttentionProblem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    deterministic: bool,
    into: QKVGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Contiguous gradients, as every backend's: compiled graphs rely on the strides."""
    grads = reference.attention_backward(p, out, lse, dout, dlse)
    if into is not None:
        return *(to.copy_(g) for to, g in zip(into, grads[:3], strict=True)), *grads[3:]  # type: ignore[return-value]
    return tuple(None if g is None else g.contiguous() for g in grads)  # type: ignore[return-value]


def cross_entropy_fwd(
    p: CrossEntropyProblem, dloss: Tensor | None, dlogits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss and lse a row; with dlogits (may be the logits) dloss · ∂loss too."""
    loss, lse = reference.cross_entropy(p)
    if dlogits is not None:
        assert dloss is not None
        dlogits.copy_(reference.cross_entropy_backward(p, lse, dloss.expand(loss.shape), None))
    return loss, lse


def cross_entropy_bwd(
    p: CrossEntropyProblem,
    lse: Tensor,
    dloss: Tensor,
    dlse: Tensor | None,
    dlogits: Tensor | None = None,
) -> Tensor:
    """dloss · ∂loss + dlse · ∂lse; copied to dlogits (may be the logits) if given."""
    gradient = reference.cross_entropy_backward(p, lse, dloss, dlse)
    return gradient if dlogits is None else dlogits.copy_(gradient)
