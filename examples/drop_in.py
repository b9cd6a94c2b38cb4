"""Change one line, keep everything else: three ways to put fastattn under code that exists.

python examples/drop_in.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def compare(
    what: str, before: Callable[[], Tensor], after: Callable[[], Tensor], repeats: int
) -> tuple[Tensor, Tensor]:
    """Prints both times; returns both results."""
    results = before(), after()
    times = milliseconds(before, repeats), milliseconds(after, repeats)
    difference = float((results[0] - results[1]).abs().max())
    print(
        f"{what:<22} {times[0]:8.2f} ms → {times[1]:8.2f} ms   largest difference {difference:.1e}"
    )
    return results


def main(quick: bool = False) -> list[tuple[Tensor, Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, heads, seqlen, head_dim = (1, 2, 64, 32) if quick else (2, 12, 1024, 64)
    repeats = 1 if quick else 5
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, seqlen, head_dim, device=device)

    # 1. A function: the same signature.
    results = [
        compare(
            "the function",
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True),
            repeats,
        )
    ]

    # 2. A model whose code stays as it is: torch's function is routed through fastattn.
    def model() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def routed() -> Tensor:
        with fastattn.sdpa():
            return model()

    results.append(compare("with fastattn.sdpa()", model, routed, repeats))

    # 3. Modules: every nn.MultiheadAttention in a model.
    width = heads * head_dim
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, device=device)
    x = torch.randn(batch, seqlen, width, device=device)
    with torch.inference_mode():
        layer.eval()
        before = layer(x)
        first = milliseconds(lambda: layer(x), repeats)
        print(fastattn.replace_modules(layer))
        after = layer(x)
        second = milliseconds(lambda: layer(x), repeats)
    print(f"{'an encoder layer':<22} {first:8.2f} ms → {second:8.2f} ms")
    results.append((before, after))

    print(fastattn.explain(*(t.transpose(1, 2) for t in (q, k, v)), causal=True))
    return results


if __name__ == "__main__":
    main()
