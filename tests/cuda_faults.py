"""Faults planted in the CUDA kernels, each of which the emulator or the bound on errors must see.

    python tests/cuda_faults.py [FILE …]   # a row a fault: what is wrong, and which case shows it

All are in one library, built of a copy of csrc: where a kernel computes `right`, there stands
`is_planted(number) ? wrong : right`. What orders threads is left out by test_cuda_barriers.py.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).parent.parent))

import emulated
import public
import torch
from emulator import build as emulator
from emulator.runtime import Library

from fastattn import testing

Case = TypeVar("Case", testing.Case, testing.DecodeCase, testing.CrossEntropyCase)


class Fault(NamedTuple):
    file: str  # of csrc/cuda
    right: str  # an expression, wherever it stands there
    wrong: str


ATTENTION = (
    Fault("query_tile.cuh", "work.head / order.group_size", "work.head % order.group_size"),
    Fault("query_tile.cuh", "keys.begin / block_n", "keys.begin / block_n + 1"),
    Fault("query_tile.cuh", "ceil_div(keys.end, block_n)", "keys.end / block_n"),
    Fault("query_tile.cuh", "lane % 4 == 0 && r < tile.rows", "lane % 4 == 0"),
    Fault("query_tile.cuh", "row.factor * kept", "row.factor"),
    Fault("work_order.cuh", "m_blocks - 1 - m_block", "m_blocks - m_block"),
    Fault("softmax.cuh", "quad_max(block_max)", "block_max"),
    Fault("softmax.cuh", "quad_sum(row_sum_[m][half])", "row_sum_[m][half]"),
    Fault("softmax.cuh", "row_sum_[m][half] * rescale", "row_sum_[m][half]"),
    Fault("softmax.cuh", "out[d][2 * half + 1] *= rescale", "out[d][2 * half + 1] *= 1.0f"),
    Fault("softmax.cuh", "ptx::ex2((logit - now) * to_power_)", "0.0f"),
    Fault("softmax.cuh", "logf(total)", "logf(sum)"),
    Fault("score_mods.cuh", "w.diagonal + w.right + 1", "w.diagonal + w.right"),
    Fault("score_mods.cuh", "w.diagonal - w.left", "w.diagonal - w.left + 1"),
    Fault("score_mods.cuh", "keys.end <= queries.begin + end", "true"),
    Fault("score_mods.cuh", "keys.end <= seqlen_k", "true"),
    Fault("score_mods.cuh", "key < begin || key >= end", "key < begin || key > end"),
    Fault("score_mods.cuh", "p_.softcap * fast_tanh(s * factor)", "p_.softcap * (s * factor)"),
    Fault("score_mods.cuh", "fabsf(first + static_cast<float>(further))", "(first + further)"),
    Fault("score_mods.cuh", "rows[m][half][column]", "rows[m][half][0]"),
    Fault("score_mods.cuh", "load_pair(rows[m][half] + at.column + 8 * n)",
          "load_pair(rows[m][half] + at.column)"),
    Fault("score_mods.cuh", "columns_ - 1", "columns_ + 63"),
    Fault("score_mods.cuh", "rows_ - 1", "rows_ + 15"),
    Fault("score_mods.cuh", "s += to_float(x)", "s += 0.0f"),
    Fault("score_mods.cuh", "at.row + 8 * mine", "at.row"),
    Fault("score_mods.cuh", "mine ? words[3] : words[1]", "words[1]"),
    Fault("philox.cuh", "words[1] ^ key0", "words[1]"),
    Fault("fragments.cuh", "lane / 16 * 8 + lane % 8", "lane % 16"),
    Fault("fragments.cuh", "2 * k + lane / 8 % 2", "2 * k"),
    Fault("fragments.cuh", "column / kChunk + lane / 16", "column / kChunk"),
    Fault("fragments.cuh", "c[2 * k][2]", "c[2 * k][0]"),
    Fault("tile_copy.cuh", "there ? 16 : 0", "16"),
    Fault("tile_copy.cuh", "i * kRowsAtOnce < rows_left", "true"),
    Fault("tile_copy.cuh", "j * kLanes * kChunk < cols_left", "true"),
    Fault("tile_copy.cuh", "2 * w + 1 < count", "2 * w < count"),
    Fault("tile_copy.cuh", "row < end ? source_.cols - col : 0", "source_.cols - col"),
    Fault("store_rows.cuh", "r < row + 16 * kM && r < count", "r < row + 16 * kM"),
    Fault("store_rows.cuh", "cols - c * kChunk", "kChunk"),
    Fault("attn_fwd.cuh", "first_key - kBlockN", "first_key"),
    Fault("products_fp32.cuh", "weights[0][n][2 + e]", "weights[0][n][e]"),
    Fault("products_fp32.cuh", "score += part[n][2 * half + e]", "score = part[n][2 * half + e]"),
    Fault("attn_bwd.cuh", "b.dlse[s.batch * b.dlse_stride_batch + head * b.dlse_stride_head + row]",
          "0.0f"),
    Fault("attn_bwd.cuh", "block / blocks % heads", "block % heads"),
    Fault("attn_bwd.cuh", "expf(sink - launch.lse[first + i])", "1.0f"),
    Fault("attn_bwd.cuh", "stage ^ 1", "stage"),
    Fault("attn_bwd.cuh", "sStats[kBlockQ + i]", "sStats[i]"),
    Fault("attn_bwd.cuh", "query_begin < block.query_end ? launch.order.group_size : 0",
          "query_begin < block.query_end"),
    Fault("attn_bwd.cuh", "query >= block.query_end", "true"),
    Fault("attn_bwd.cuh", "p.scale", "1.0f"),
    Fault("key_block.cuh", "first + keys - 1 + queries.end", "first + queries.end"),
    Fault("key_block.cuh", "first + queries.first", "first + keys"),
    Fault("bwd_gradients.cuh", "dweight - lse_delta.y", "dweight"),
    Fault("bwd_gradients.cuh", "dweight * kept - lse_delta.y", "dweight * kept"),
    Fault("bwd_gradients.cuh", "dweight *= slopes[m][n][2 * half + e]", "dweight *= 1.0f"),
    Fault("bwd_gradients.cuh", "prob * kept", "prob"),
    Fault("bwd_gradients.cuh", "dbias + row * stride.row + column * stride.col", "dbias"),
)  # fmt: skip
DECODE = (
    Fault("attn_decode.cu", "key < t.keys.end", "key <= t.keys.end"),
    Fault("attn_decode.cu", "states[n].row_max - total.row_max", "0.0f"),
    Fault("attn_decode.cu", "out[r][i] *= scale", "out[r][i] *= 1.0f"),
    Fault("attn_decode.cu", "__shfl_xor_sync(kAll, s[r][n], apart)", "s[r][n]"),
    Fault("attn_decode.cuh", "last_query + t.last_key + 1", "last_query + t.last_key"),
    Fault("attn_decode.cuh", "p.cache_leftpad ? p.cache_leftpad[t.batch] : 0", "0"),
    Fault("attn_decode.cuh", "(end - begin + p.splits - 1) / p.splits",
          "(end - begin) / p.splits"),
    Fault("attn_decode.cuh", "key <= query + last_key", "true"),
    Fault("attn_decode.cuh", "row - query * t.group_size", "0"),
    Fault("attn_decode.cuh", "p.softcap * tanhf(s / p.softcap)", "s"),
    Fault("attn_decode.cuh", "slope * float(distance)", "slope"),
    Fault("attn_decode.cuh", "exp_of(p.sinks[head] - most)", "0.0f"),
    Fault("attn_decode.cuh", "state.row_sum * scale[team]", "state.row_sum"),
    Fault("attn_decode.cuh", "d < count", "true"),
    Fault("attn_decode_mma.cuh", "quad_max(row_max)", "row_max"),
    Fault("attn_decode_mma.cuh", "quad_sum(states[h].row_sum)", "states[h].row_sum"),
    Fault("attn_decode_mma.cuh", "8 * n + 2 * t + e % 2", "8 * n + t + e % 2 * 4"),
    Fault("attn_decode_mma.cuh", "scale[e / 2]", "scale[0]"),
    Fault("kv_cache.cuh", "j - page * page_size", "0"),
    Fault("kv_cache.cuh", "p.cache_batch_idx ? p.cache_batch_idx[b] : b", "b"),
    Fault("cache_append.cu", "p.cache_seqlens[b] + int(i)", "p.cache_seqlens[b]"),
    Fault("cache_append.cu", "a * cos - b * sin", "a * cos + b * sin"),
    Fault("cache_append.cu", "p.rotary_interleaved ? 2 * unit : unit", "unit"),
    Fault("cache_append.cu", "src[unit + pairs]", "src[unit]"),
)  # fmt: skip
CROSS_ENTROPY = (
    Fault("cross_entropy.cu", "row.sum *= exp_of(shift)", "row.sum *= 1.0f"),
    Fault("cross_entropy.cu", "total.smooth += other.smooth", "total.smooth = other.smooth"),
    Fault("cross_entropy.cu", "weight[i]", "1.0f"),
    Fault("cross_entropy.cu", "cap * tanhf(x / cap)", "x"),
    Fault("cross_entropy.cu", "1 - t * t", "1.0f"),
    Fault("cross_entropy.cu", "v < p.held", "true"),
    Fault("cross_entropy.cu", "ignored ? 0.0f : loss", "loss"),
    Fault("cross_entropy.cu", "p.z_loss * lse * lse", "p.z_loss * lse"),
    Fault("cross_entropy.cu", "2 * g * p.z_loss * lse", "g * p.z_loss * lse"),
    Fault("cross_entropy.cu", "(1 - p.label_smoothing) * weight", "weight"),
    Fault("cross_entropy.cu", "p.weight[target]", "1.0f"),
    Fault("cross_entropy.cu", "t * expm1f(-nll)", "t * p_y"),
    Fault("cross_entropy.cu", "int64_t(v) * kVec<T>", "int64_t(v)"),
    Fault("cross_entropy.cu", "dx[target]", "dx[0]"),
)
FAULTS = (*ATTENTION, *DECODE, *CROSS_ENTROPY)


def plant(copy: Path) -> None:
    """Files that stay the same keep their time, and what was compiled of them."""
    original = emulator.ROOT / "csrc"
    for file in sorted(path for path in original.rglob("*") if path.is_file()):
        text = file.read_text()
        for number, fault in enumerate(FAULTS, 1):
            if fault.file != file.name:
                continue
            words = map(re.escape, fault.right.split())
            planted = f"(emulator::is_planted({number}) ? ({fault.wrong}) : ({fault.right}))"
            pattern = r"(?<!\w)" + r"\s+".join(words)
            text, count = re.subn(pattern, lambda _, new=planted: new, text)
            assert count > 0, f"{fault.file} has no {fault.right}"
        target = copy / file.relative_to(original)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def library() -> Path:
    """sm_80's kernels with all faults; a minute's work."""
    copy = emulator.OUTPUT / "faulty" / "csrc"
    plant(copy)
    return emulated.build(copy, "faulty_kernels", (75, 90))


# --- what shows them ------------------------------------------------------------------------------

ATTENTION_CASES = (
    "lengths-63-65", "gqa-4-causal", "everything", "packed-everything", "window-both",
    "dims-192-128", "dim-3", "mask-empty-rows-sinks", "alibi", "dropout-causal-odd", "no-keys",
    "bias-fp32", "softcap-causal", "window-left", "scale",
)  # fmt: skip
DECODE_CASES = (
    "plain", "splits-5", "mqa", "queries-4-causal", "window-both", "softcap", "alibi", "sinks",
    "leftpad-append", "batch-idx", "rotary-interleaved", "rotary-partial", "paged-7-append",
    "dim-3",
)  # fmt: skip
MANY_ROWS = testing.DecodeCase(  # of a tile of tensor cores, whose keys come in several turns
    "many-rows", (700, 300), 3, capacity=700, heads=(5, 1), head_dim=64, num_splits=3
)
CE_CASES = ("everything", "weight-smoothing", "vocab-50257", "plain")


def attention_check(case: testing.Case, dtype: torch.dtype) -> Callable[[], None]:
    p = testing.make_problem(case, dtype)
    if p.dropout_p > 0:
        p = p._replace(seed=public.drawn_seed())
    expected = functools.cache(lambda: testing.attention_expected(p))

    def check() -> None:
        ours = testing.attention_results(public.attention_on("cuda"), p)
        testing.assert_results_close(ours, *expected())

    return check


def checks() -> dict[tuple[Fault, ...], dict[str, Callable[[], None]]]:
    """By the faults that they are to show: checks by case and dtype."""

    def each(cases: Iterable[Case], check: Callable[[Case, torch.dtype], Callable[[], None]]):
        dtypes = (torch.float16, torch.float32)
        return {f"{c} {public.name_of(dtype)}": check(c, dtype) for c in cases for dtype in dtypes}

    def decode_check(case: testing.DecodeCase, dtype: torch.dtype) -> Callable[[], None]:
        function = functools.partial(public.decode, backend="cuda")
        return lambda: testing.check_decode(function, testing.make_decode_problem(case, dtype))

    def loss_check(case: testing.CrossEntropyCase, dtype: torch.dtype) -> Callable[[], None]:
        function = functools.partial(public.cross_entropy, backend="cuda")
        p = testing.make_cross_entropy_problem(case, dtype)
        return lambda: testing.check_cross_entropy(function, p)

    attention = (case for case in testing.CASES if case.name in ATTENTION_CASES)
    decode = (case for case in testing.DECODE_CASES if case.name in DECODE_CASES)
    losses = (case for case in testing.CE_CASES if case.name in CE_CASES)
    return {
        ATTENTION: each(attention, attention_check),
        DECODE: each((*decode, MANY_ROWS), decode_check),
        CROSS_ENTROPY: each(losses, loss_check),
    }


def caught(fault: int, group: dict[str, Callable[[], None]], kernels: Library) -> str | None:
    """Which check shows a fault, and how; None where all pass."""
    kernels.set_options(f"fault={fault}")
    for name, check in group.items():
        try:
            check()
        except (AssertionError, RuntimeError) as error:
            return f"{name}: {str(error).strip().splitlines()[0]}"
    return None


def main(files: list[str]) -> int:
    path = library()
    os.environ |= {"FASTATTN_EMULATE": str(path), "FASTATTN_EMULATE_ARCH": "80"}
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    kernels, count, missed = Library(path), 0, 0
    for faults, group in checks().items():
        if (problem := caught(0, group, kernels)) is not None:
            print(f"without any fault, {problem}")
            return 1
        for fault in faults:
            if files and fault.file not in files:
                continue
            how = caught(FAULTS.index(fault) + 1, group, kernels)
            count += 1
            missed += how is None
            print(f"{'caught' if how else 'MISSED'}  {fault.file}: {fault.wrong}  ({how})")
    print(f"{count} faults, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
