"""The CPU kernels against PyTorch's own: `python -m benchmarks.bench_cpu [--quick] [--only
attention decode …]`.

Prints a table (ours, torch, their ratio, the share of the measured GEMM or memory-read speed that
ours reaches, errors against fp64) and writes JSON and a plot into benchmarks/results/. Everything
goes through the public API, autograd included. Peers get the layout they like best: (B, H, S, D)
contiguous for torch, (B, S, H, D) contiguous for us, the same values. Needs fastattn[bench].
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .harness import RESULTS, Ceilings, Competitor, interleave, machine, max_error, write_json

VOCAB = 50257  # GPT-2's


@dataclasses.dataclass
class Case:
    """One row of the table: the competitors, "ours" and "torch" among them, and their work."""

    suite: str
    name: str
    dtype: torch.dtype
    competitors: dict[str, Competitor]
    flops: float = 0.0  # of the whole case, causal counted half; bound by the GEMM ceiling
    bytes: float = 0.0  # that must be read; bound by the read ceiling
    errors: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # max abs error of the result, against fp64


def attention_cases(quick: bool) -> Iterator[Case]:
    shapes = [(8, 6, 256, 64), (4, 12, 1024, 64), (1, 16, 4096, 64), (1, 8, 4096, 128)]
    for batch, heads, seqlen, head_dim in shapes[:2] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, dout = (
                torch.randn(batch, seqlen, heads, head_dim).to(dtype) for _ in range(4)
            )
            qt, kt, vt, doutt = (t.transpose(1, 2).contiguous() for t in (q, k, v, dout))
            for causal in (False, True):
                flops = 4 * batch * heads * seqlen**2 * head_dim * (0.5 if causal else 1)
                name = f"S{seqlen} D{head_dim} ({batch},{heads}) {'causal' if causal else 'full'}"

                def ours(q=q, k=k, v=v, causal=causal):
                    return fastattn.attention(q, k, v, causal=causal, backend="cpu")

                def theirs(q=qt, k=kt, v=vt, causal=causal):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

                errors = _attention_errors(q, k, v, causal)
                with_no_grad = {
                    "ours": Competitor(_no_grad(ours)),
                    "torch": Competitor(_no_grad(theirs)),
                }
                yield Case("attention fwd", name, dtype, with_no_grad, flops, errors=errors)
                trained = {
                    "ours": Competitor(_forward_backward(ours, (q, k, v), dout)),
                    "torch": Competitor(_forward_backward(theirs, (qt, kt, vt), doutt)),
                }
                yield Case("attention fwd+bwd", name, dtype, trained, 3.5 * flops, errors=errors)


def decode_cases(quick: bool) -> Iterator[Case]:
    shapes = [(8, 32, 8, 4096, 128), (8, 8, 8, 4096, 128), (1, 32, 8, 4096, 128)]
    for batch, heads, kv_heads, length, head_dim in shapes[2:] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.randn(batch, 1, heads, head_dim).to(dtype)
            k, v = (torch.randn(batch, length, kv_heads, head_dim).to(dtype) for _ in range(2))
            lengths = torch.full((batch,), length, dtype=torch.int32)
            qt, kt, vt = (t.transpose(1, 2).contiguous() for t in (q, k, v))
            folded = qt.view(
                batch, kv_heads, heads // kv_heads, head_dim
            )  # the group as queries: a user's own trick

            def ours(q=q, k=k, v=v, lengths=lengths):
                return fastattn.attention_decode(q, k, v, cache_seqlens=lengths, backend="cpu")

            def theirs(q=qt, k=kt, v=vt):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

            def folding(q=folded, k=kt, v=vt):
                return F.scaled_dot_product_attention(q, k, v)

            ref64 = F.scaled_dot_product_attention(
                *(t.double() for t in (qt, kt, vt)), enable_gqa=True
            )
            yield Case(
                "decode",
                f"B{batch} H{heads}/{kv_heads} keys {length} D{head_dim}",
                dtype,
                {"ours": Competitor(_no_grad(ours)), "torch": Competitor(_no_grad(theirs))}
                | (
                    {"torch, group folded": Competitor(_no_grad(folding))}
                    if heads != kv_heads
                    else {}
                ),
                bytes=2 * k.numel() * k.element_size(),
                errors={
                    "ours": max_error(ours().transpose(1, 2), ref64),
                    "torch": max_error(theirs(), ref64),
                },
            )


def cross_entropy_cases(quick: bool) -> Iterator[Case]:
    rows = 512 if quick else 2048
    for dtype in (torch.float32, torch.bfloat16):
        kept = torch.randn(rows, VOCAB).to(dtype)
        target = torch.randint(0, VOCAB, (rows,))
        logits = kept.clone().requires_grad_()
        ref64 = torch.stack(
            [
                F.cross_entropy(x.double(), t)
                for x, t in zip(kept.split(256), target.split(256), strict=True)
            ]
        )
        size, name = kept.numel() * kept.element_size(), f"N{rows} V{VOCAB}"

        def theirs(logits=logits, target=target):
            return F.cross_entropy(logits, target)

        def ours(logits=logits, target=target, inplace=False):
            return fastattn.cross_entropy(logits, target, inplace=inplace, backend="cpu")

        def restore(logits=logits, kept=kept):
            logits.data.copy_(kept)

        def ours_inplace(logits=logits, target=target):
            return fastattn.cross_entropy(logits, target, inplace=True, backend="cpu")

        errors = {n: max_error(f(), ref64.mean()) for n, f in (("ours", ours), ("torch", theirs))}
        backward = {
            n: _loss_backward(f, logits)
            for n, f in (("torch", theirs), ("ours", ours), ("in", ours_inplace))
        }
        in_place = {
            "ours": Competitor(backward["in"], restore),
            "torch": Competitor(backward["torch"], restore),
        }
        fresh = {"ours": Competitor(backward["ours"]), "torch": Competitor(backward["torch"])}
        forward = {"ours": Competitor(_no_grad(ours)), "torch": Competitor(_no_grad(theirs))}
        yield Case(
            "cross-entropy fwd+bwd in place", name, dtype, in_place, bytes=size, errors=errors
        )
        restore()
        yield Case("cross-entropy fwd+bwd", name, dtype, fresh, bytes=2 * size, errors=errors)
        yield Case("cross-entropy fwd", name, dtype, forward, bytes=size, errors=errors)


def linear_cross_entropy_cases(quick: bool) -> Iterator[Case]:
    rows, channels = (512 if quick else 2048), 768
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, channels).to(dtype).requires_grad_()
        w = (torch.randn(VOCAB, channels) * channels**-0.5).to(dtype).requires_grad_()
        target = torch.randint(0, VOCAB, (rows,))

        def theirs(x=x, w=w, target=target):
            return F.cross_entropy(F.linear(x, w), target)

        def ours(x=x, w=w, target=target):
            return fastattn.linear_cross_entropy(x, w, target, backend="cpu")

        with torch.no_grad():
            w64, parts = w.double(), zip(x.double().split(256), target.split(256), strict=True)
            ref64 = torch.stack([F.cross_entropy(a @ w64.t(), t) for a, t in parts]).mean()
            errors = {"ours": max_error(ours(), ref64), "torch": max_error(theirs(), ref64)}
        both = {
            n: Competitor(_loss_backward(f, x, w)) for n, f in (("ours", ours), ("torch", theirs))
        }
        yield Case(
            "linear cross-entropy fwd+bwd",
            f"N{rows} C{channels} V{VOCAB}",
            dtype,
            both,
            flops=6 * rows * channels * VOCAB,
            errors=errors,
        )


SUITES = {
    "attention": attention_cases,
    "decode": decode_cases,
    "cross-entropy": cross_entropy_cases,
    "linear-cross-entropy": linear_cross_entropy_cases,
}


def _no_grad(run):
    return torch.no_grad()(run)


def _forward_backward(run, tensors: tuple[Tensor, ...], dout: Tensor):
    leaves = tuple(t.detach().requires_grad_() for t in tensors)

    def step():
        for t in leaves:
            t.grad = None
        run(*leaves).backward(dout)

    return step


def _loss_backward(run, *leaves: Tensor):
    def step():
        for t in leaves:
            t.grad = None
        run().backward()

    return step


def _attention_errors(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, float]:
    """Forward errors on one head of one sequence (fp64 scores of all would be large)."""
    one = [t[:1, :, :1] for t in (q, k, v)]
    ref64 = fastattn.attention(*(t.double() for t in one), causal=causal, backend="reference")
    theirs = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in one), is_causal=causal
    ).transpose(1, 2)
    ours = fastattn.attention(*one, causal=causal, backend="cpu")
    return {"ours": max_error(ours, ref64), "torch": max_error(theirs, ref64)}


def run_case(case: Case, ceilings: Ceilings, seconds: float) -> dict:
    timings = interleave(case.competitors, seconds)
    ours = timings["ours"].median
    work, ceiling = (
        (case.flops, ceilings.gemm_flops) if case.flops else (case.bytes, ceilings.read_bytes)
    )
    return {
        "suite": case.suite,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "seconds": {name: dataclasses.asdict(t) for name, t in timings.items()},
        "ratio": timings["torch"].median / ours,
        "floor_seconds": work / ceiling,
        "share_of_floor": work / ceiling / ours,
        "bound": "gemm" if case.flops else "memory read",
        "errors": case.errors,
    }


def print_table(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fastattn against PyTorch on the CPU")
    for column in ("", "case", "dtype"):
        table.add_column(column)
    for column in (
        "ours ms",
        "torch ms",
        "torch / ours",
        "share of peak",
        "error ours",
        "error torch",
    ):
        table.add_column(column, justify="right")
    suite = None
    for r in results:
        ms = {name: f"{1e3 * t['median']:.2f}" for name, t in r["seconds"].items()}
        table.add_row(
            r["suite"] if r["suite"] != suite else "",
            r["case"],
            r["dtype"],
            ms["ours"],
            ms["torch"],
            f"{r['ratio']:.2f}",
            f"{100 * r['share_of_floor']:.0f} % {'GEMM' if r['bound'] == 'gemm' else 'read'}",
            f"{r['errors']['ours']:.1e}",
            f"{r['errors']['torch']:.1e}",
            end_section=False,
        )
        for name, t in r["seconds"].items():
            if name not in ("ours", "torch"):
                extra = t["median"] / r["seconds"]["ours"]["median"]
                table.add_row(
                    "", f"  {name}", "", "", f"{1e3 * t['median']:.2f}", f"{extra:.2f}", "", "", ""
                )
        suite = r["suite"]
    Console(width=132).print(table)


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    labels = [f"{r['suite']}  {r['case']}  {r['dtype']}" for r in results][::-1]
    ratios = [r["ratio"] for r in results][::-1]
    figure, axes = plt.subplots(figsize=(10, 1 + 0.24 * len(results)))
    axes.barh(labels, ratios, color=["tab:blue" if x >= 1 else "tab:red" for x in ratios])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times faster than PyTorch (1 = equal)")
    axes.tick_params(axis="y", labelsize=7)
    for y, x in enumerate(ratios):
        axes.text(x, y, f" {x:.2f}", va="center", fontsize=7)
    m = machine()
    axes.set_title(
        f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, {m['isa']}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument(
        "--only", nargs="+", choices=SUITES, default=list(SUITES), help="suites to run"
    )
    parser.add_argument(
        "--seconds", type=float, default=None, help="time a case (default 5, quick 0.5)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="JSON file; the plot goes beside it")
    args = parser.parse_args()
    from rich.progress import Progress

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    seconds = args.seconds or (0.5 if args.quick else 5)
    ceilings = Ceilings()
    results: list[dict] = []
    with Progress() as progress:
        bar = progress.add_task("benchmarks", total=None)
        for suite in args.only:
            for case in SUITES[suite](args.quick):
                progress.update(bar, description=f"{case.suite} {case.name} {str(case.dtype)[6:]}")
                ceilings.measure()
                results.append(run_case(case, ceilings, seconds))
                progress.advance(bar)
    print_table(results)
    print(
        f"Ceilings, best of this run: fp32 matrix product {ceilings.gemm_flops / 1e9:.0f} GFLOP/s,"
        f" memory read {ceilings.read_bytes / 1e9:.1f} GB/s. Share of peak: least possible time by"
        " these, over ours."
    )
    m = machine()
    out = args.out or RESULTS / f"cpu-{m['isa']}-{m['threads']}threads-{m['commit']}.json"
    write_json(out, ceilings, results)
    plot(results, out.with_suffix(".png"))
    print(f"wrote {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
