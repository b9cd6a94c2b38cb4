"""The benchmarks' cases and peers: each peer here gives what fp64 says, on small shapes."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import package_signatures
import pretend_device
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import fastattn
from benchmarks import (
    attention_packages,
    attention_peers,
    decode,
    losses,
    package,
    suites,
    train_step,
)
from benchmarks.attention import Attention
from benchmarks.case import short
from benchmarks.decode import Decode
from benchmarks.device import Cpu
from benchmarks.losses import CrossEntropy, LinearCrossEntropy
from benchmarks.runner import errors, only_run
from benchmarks.train_step import TrainStep
from fastattn.gpt import GPTConfig

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
SHAPE = {"batch": 1, "seqlen": 40, "heads": 4, "head_dim": 16, "causal": True}
ATTENTION = [
    Attention(suite="attention-fwd", dtype=FP32, **SHAPE | {"batch": 2, "causal": False}),
    Attention(suite="attention-fwd", dtype=BF16, **SHAPE),
    Attention(suite="attention-bwd", dtype=FP32, **SHAPE | {"batch": 2}, kv_heads=2, passes="bwd"),
    Attention(suite="attention-bwd", dtype=FP32, **SHAPE, passes="fwd+bwd"),
    Attention(suite="features", dtype=FP32, **SHAPE, passes="bwd", window=7, head_dim_v=8),
    *(
        Attention(suite="features", dtype=FP32, **SHAPE, passes="bwd", extra=extra)
        for extra in ("softcap", "alibi", "sinks")
    ),
    *(
        Attention(suite="features", dtype=FP32, **SHAPE | {"causal": False}, passes="bwd", extra=e)
        for e in ("mask", "bias")
    ),
    *(
        Attention(suite="varlen", dtype=FP32, **SHAPE, lengths=(25, 1, 14), passes=each)
        for each in ("fwd", "bwd")
    ),
]
SIZES = {"batch": 3, "heads": 4, "kv_heads": 2, "keys": 32, "head_dim": 16}
DECODE = [
    Decode(suite="decode", dtype=FP32, **SIZES),
    Decode(suite="decode", dtype=FP32, **SIZES, page_size=8),
]
LOSSES = [
    *(
        CrossEntropy(suite="cross-entropy", dtype=FP32, rows=20, vocab=50, passes=passes)
        for passes in ("fwd", "fwd+bwd", "fwd+bwd in place")
    ),
    LinearCrossEntropy(suite="linear-cross-entropy", dtype=FP32, rows=20, channels=8, vocab=50),
]
TRAIN = TrainStep(
    suite="train-step",
    dtype=FP32,
    label="tiny",
    model=GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16),
    batch=2,
)


def check(peer, case):
    """The peer's first and second result, against fp64."""
    inputs = case.inputs(CPU)
    call, exact = peer.prepare(case, inputs), case.exact(inputs)
    assert exact
    for _ in range(1 if case.suite == "train-step" else 2):
        check_results(peer.name, call.first(), case, exact)


def check_results(peer, found, case, exact):
    for name, error in errors(case, found, exact).items():
        bound = 1e-5 if case.dtype == FP32 and peer != "flash-attn 4" else 2e-2
        largest = float(exact[name].abs().max())
        assert error < bound * max(1.0, largest), f"{peer}: {name} is off by {error}"


@pytest.mark.parametrize("case", [*ATTENTION, *DECODE, *LOSSES, TRAIN], ids=lambda c: c.name)
def test_every_peer_that_is_here_gives_what_fp64_says(case):
    took = []
    for peer in suites.peers():
        if case.suite not in peer.suites or peer.compiles or peer.name == "transformers":
            continue
        if peer.refuses(case, CPU) is None:
            check(peer, case)
            took.append(peer.name)
    assert {"fastattn cpu", "eager"} <= set(took)


def test_nothing_is_left_on_the_cpu():
    """In a process of its own: autograd must not have met the CPU alone before."""
    code = "import os, test_bench_cases; test_bench_cases.on_a_pretended_device(); os._exit(0)"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True)


def on_a_pretended_device():
    """Everything on a device that, as a GPU, takes no tensors of the CPU's."""
    pretend_device.register()
    device = torch.device(pretend_device.NAME, 0)
    anywhere = {"eager", "torch", "torch SDPA", "nanoGPT-style"}
    for case in (*ATTENTION, *DECODE, *LOSSES, TRAIN):
        inputs = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x
            for name, x in case.inputs(CPU).items()
        }
        exact = case.exact(inputs)
        for peer in suites.peers():
            fits = case.suite in peer.suites and not case.features - peer.features
            if fits and peer.name in anywhere:
                check_results(peer.name, peer.prepare(case, inputs).first(), case, exact)


@pytest.mark.slow  # compiling takes minutes
@pytest.mark.parametrize("case", [ATTENTION[0], ATTENTION[1], *LOSSES, TRAIN], ids=lambda c: c.name)
def test_peers_that_compile(case):
    for peer in suites.peers():
        if case.suite in peer.suites and peer.compiles and peer.refuses(case, CPU) is None:
            torch.compiler.reset()
            check(peer, case)


def test_a_kernel_of_sdpa_s_is_chosen_inside_what_is_compiled(monkeypatch):
    """Beside a model of the same class that was compiled without."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    inputs, found = TRAIN.inputs(CPU), []
    for prepare in (train_step.plain(compiled=True), train_step.plain_by(SDPBackend.MATH)):
        call = prepare(TRAIN, inputs)
        call.run()
        with torch.profiler.profile() as profile:
            call.run()
        found.append(any("flash_attention" in event.key for event in profile.key_averages()))
    assert found == [True, False]


def test_transformers_trains_from_the_same_weights():
    pytest.importorskip("transformers")
    (peer,) = (p for p in train_step.PEERS if p.name == "transformers")
    check(peer, TRAIN)


def test_the_peak_of_a_loss_has_its_gradient():
    case = CrossEntropy(suite="cross-entropy", dtype=FP32, rows=512, vocab=50257)
    call = losses.our_cross_entropy("cpu")(case, case.inputs(CPU))
    call.first()
    call.release()
    peak = Cpu().peak_bytes(lambda: only_run(call))
    assert peak is None or 0.9 < peak / case.moved_bytes * 2 < 1.5


@pytest.mark.parametrize("passes", ["fwd", "bwd"])
def test_dropout_is_exact_with_the_same_seed(passes):
    case = Attention(suite="features", dtype=FP32, **SHAPE, extra="dropout", passes=passes)
    inputs = case.inputs(CPU)
    torch.manual_seed(5)
    exact = case.exact(inputs)
    for peer in attention_peers.PEERS:
        if peer.backend in ("cpu", "reference"):
            torch.manual_seed(5)
            check_results(peer.name, peer.prepare(case, inputs).first(), case, exact)
    torch.manual_seed(6)
    other = errors(case, attention_peers.ours("cpu")(case, inputs).first(), exact)
    assert min(other.values()) > 1e-3


def test_inputs_are_the_same_in_every_run():
    a, b = (ATTENTION[0].inputs(CPU) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- packages that need a GPU, played by functions that don't ----------------------------------


def bottom_right(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, **more):
    renamed = {"learnable_sink": "sinks", "alibi_slopes": "alibi_slopes"}
    options = {renamed[name]: x.float() for name, x in more.items()}
    window = tuple(-1 if side is None else side for side in window_size)
    return fastattn.attention(
        q, k, v, causal=causal, window=window, softcap=softcap, backend="reference", **options
    )


def packed(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=(-1, -1), **options
):
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = {"window": window_size} | options
    return fastattn.attention_varlen(q, k, v, *lengths, backend="reference", **options)


def with_kv_cache(q, k_cache, v_cache, cache_seqlens, block_table=None, page_table=None):
    table = block_table if page_table is None else page_table
    options = {"cache_seqlens": cache_seqlens, "block_table": table}
    return fastattn.attention_decode(q, k_cache, v_cache, backend="reference", **options)


def memory_efficient_attention(query, key, value, attn_bias, p):
    kind, given = (None, None) if attn_bias is None else attn_bias
    if kind == "packed":
        lengths, causal = given
        ends, longest = torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
        q, k, v = query[0], key[0], value[0]
        out = packed(q, k, v, ends, ends, longest, longest, (-1, 0) if causal else (-1, -1))
        return out[None]
    window = {None: (-1, -1), "causal": (-1, 0), "window": ((given or 0) - 1, 0)}[kind]
    return fastattn.attention(query, key, value, window=window, dropout_p=p, backend="reference")


class BlockDiagonalMask(tuple):
    def make_causal(self):
        return ("packed", (self[1][0], True))


class Prefill:
    def __init__(self, float_workspace_buffer, kv_layout):
        assert kv_layout == "NHD"

    def plan(self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, **options):
        self.ends, self.options = qo_indptr, options
        self.sizes = (num_qo_heads, num_kv_heads, head_dim_qk, options["head_dim_vo"])

    def run(self, q, k, v):
        assert self.sizes == (q.shape[1], k.shape[1], q.shape[2], v.shape[2])
        assert q.dtype == self.options["q_data_type"]
        o, longest = self.options, int(self.ends.diff().max())
        window = (o["window_left"], 0) if o["causal"] else (-1, -1)
        options = {"window": window, "softcap": o["logits_soft_cap"]}
        return packed(q, k, v, self.ends, self.ends, longest, longest, **options)


class PagedDecode:
    def __init__(self, float_workspace_buffer, kv_layout, use_tensor_cores):
        assert kv_layout == "NHD"

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        **dtypes,
    ):
        self.table = indices.view(len(indptr) - 1, -1)
        self.lengths = (indptr.diff() - 1) * page_size + last_page_len

    def run(self, q, paged_kv_cache):
        return with_kv_cache(q[:, None], *paged_kv_cache, self.lengths, self.table)[:, 0]


def signed(module, name, function):
    """The function, which is called as the package's of that name can be called."""
    signature = package_signatures.signature(module, name)
    taken = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    @functools.wraps(function)
    def call(*args, **options):
        given = signature.bind(*args, **options).arguments
        for more in taken:
            given |= given.pop(more, {})
        return function(**given)

    return call


@pytest.fixture
def packages(monkeypatch):
    """Modules with the packages' names and signatures, and our reference inside."""

    def module(name, **contents):
        fake = ModuleType(name)
        vars(fake).update(contents)
        monkeypatch.setitem(sys.modules, name, fake)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, fake)
        return fake

    def functions(where, **stubs):
        return {name: signed(where, name, stub) for name, stub in stubs.items()}

    def wrapper(where, name, stub):
        methods = {n: getattr(stub, n) for n in ("__init__", "plan", "run")}
        signs = {n: signed(where, f"{name}.{n}", method) for n, method in methods.items()}
        return type(name, (), signs)

    attend = {"flash_attn_func": bottom_right, "flash_attn_varlen_func": packed}
    both = {name: lambda *a, f=f, **o: (f(*a, **o), None) for name, f in attend.items()}
    cached = attend | {"flash_attn_with_kvcache": with_kv_cache}
    module("flash_attn")
    two, three = "flash_attn.flash_attn_interface", "flash_attn_interface"
    module(two, **functions(two, **cached))
    module(three, **functions(three, **cached))
    module("flash_attn.cute", **functions("flash_attn.cute.interface", **both))

    module("xformers")
    module("xformers.ops", **functions(
        "xformers.ops.fmha", memory_efficient_attention=memory_efficient_attention
    ))  # fmt: skip
    module("xformers.ops.fmha")
    from_seqlens = signed(
        "xformers.ops.fmha.attn_bias", "BlockDiagonalMask.from_seqlens",
        lambda cls, q_seqlen: BlockDiagonalMask(("packed", (q_seqlen, False))),
    )  # fmt: skip
    module(
        "xformers.ops.fmha.attn_bias",
        BlockDiagonalMask=type("", (), {"from_seqlens": classmethod(from_seqlens)}),
        LowerTriangularFromBottomRightMask=lambda: ("causal", None),
        LowerTriangularFromBottomRightLocalAttentionMask=lambda width: ("window", width),
    )

    prefill, decoding = "BatchPrefillWithRaggedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"
    module("flashinfer", **{
        prefill: wrapper("flashinfer.prefill", prefill, Prefill),
        decoding: wrapper("flashinfer.decode", decoding, PagedDecode),
    })  # fmt: skip

    module("liger_kernel")
    module("liger_kernel.transformers")
    where = "liger_kernel.transformers.functional"
    module(where, **functions(
        where,
        liger_cross_entropy=F.cross_entropy,
        liger_fused_linear_cross_entropy=lambda input, weight, target: losses.textbook(
            input, weight, target
        ),
    ))  # fmt: skip
    where = "cut_cross_entropy.linear_cross_entropy"
    module("cut_cross_entropy", **functions(
        where, linear_cross_entropy=lambda e, c, targets: losses.textbook(e, c, targets)
    ))  # fmt: skip
    module("quack")
    where = "quack.cross_entropy"
    module(where, **functions(
        where,
        cross_entropy=lambda x, target, reduction, inplace_backward: F.cross_entropy(x, target),
    ))  # fmt: skip
    where = "quack.linear_cross_entropy"
    module(where, **functions(
        where,
        chunked_linear_cross_entropy=lambda x, weight, target, reduction: losses.textbook(
            x, weight, target
        ),
    ))  # fmt: skip


NAMES = ("flash-attn 2", "flash-attn 3", "flash-attn 4", "xFormers", "FlashInfer")
NAMES += ("Liger", "cut-cross-entropy", "quack")


@pytest.mark.parametrize("name", NAMES)
def test_adapters_pass_on_what_a_case_says(name, packages):
    """By the signatures of the real packages: those installed, or else those that were checked."""
    modules = (attention_packages, decode, losses)
    peers = [peer for m in modules for peer in m.PEERS if peer.name == name]
    took = 0
    for peer in peers:
        for case in [*ATTENTION, *DECODE, *LOSSES]:
            if case.suite not in peer.suites or case.features - peer.features or peer.unfit(case):
                continue
            if case.features >= {"window", "another D of v"}:
                continue
            check(peer, case)
            took += 1
    assert took


@pytest.mark.parametrize("where", package_signatures.SIGNATURES, ids=".".join)
def test_signatures_are_the_installed_packages(where):
    """Those that are written down; a newer package may have more."""
    found = package_signatures.installed(*where)
    if found is None:
        pytest.skip(f"{where[0].partition('.')[0]} is not installed")
    expected = package_signatures.SIGNATURES[where]
    used = [part.split("=")[0] for part in expected.split(", ")]
    assert [name for name in used if name.isidentifier() and name not in found] == []


def test_peers_say_why_not():
    case = Attention(suite="features", dtype=FP32, **SHAPE, extra="sinks")
    reasons = {p.name: p.refuses(case, CPU) for p in suites.peers() if "features" in p.suites}
    assert reasons["fastattn cpu"] is None
    assert reasons["torch SDPA"] == "no sinks"
    assert reasons["torch SDPA cuDNN"] == "not for cpu"
    bf16 = Attention(suite="attention-fwd", dtype=BF16, **SHAPE)
    fa2 = next(p for p in attention_packages.PEERS if p.name == "flash-attn 2")
    assert fa2.refuses(bf16, torch.device("cuda")) == "not installed"
    assert fa2.refuses(case, torch.device("cuda")) == "no fp32"


# ---- the suites ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_many_and_distinct(device):
    cases = suites.cases(device)
    here = set(suites.SUITES) - ({"ladder"} if device == "cpu" else set())
    assert {case.suite for case in cases} == here
    assert {case.suite for case in cases if case.quick} == here
    names = [(case.suite, case.name, case.dtype) for case in cases]
    assert len(set(names)) == len(names)
    telling = {case.suite for case in cases if case.rank == 0}
    assert {"attention-fwd", "attention-bwd", "decode", "cross-entropy", "train-step"} <= telling
    assert all(case.flops or case.moved_bytes for case in cases if case.suite != "import-and-build")


def test_flops_and_bytes():
    full = Attention(suite="", dtype=BF16, batch=2, seqlen=8, heads=3, head_dim=4)
    assert full.flops == 4 * 2 * 3 * 8 * 8 * 4
    assert full.moved_bytes == 4 * 2 * 8 * 3 * 4 * 2
    half = Attention(suite="", dtype=BF16, batch=2, seqlen=8, heads=3, head_dim=4, causal=True)
    assert half.flops == full.flops * 36 / 64
    both = Attention(suite="", dtype=BF16, batch=2, seqlen=8, heads=3, head_dim=4, passes="fwd+bwd")
    assert both.flops == 3.5 * full.flops and both.moved_bytes == 3 * full.moved_bytes
    loss = LinearCrossEntropy(suite="", dtype=FP32, rows=5, channels=3, vocab=7)
    assert loss.flops == 6 * 5 * 3 * 7
    assert CrossEntropy(suite="", dtype=BF16, rows=5, vocab=7).moved_bytes == 2 * 5 * 7 * 2
    assert short(BF16) == "bf16" and short("float32") == "fp32"


def test_an_import_is_timed_in_a_fresh_process():
    case = package.Package(suite="import-and-build", what="import")
    peers = {peer.name: peer for peer in package.PEERS}
    peers["torch"].prepare(case, {})  # nothing yet
    package.importing("json").run()
    with pytest.raises(RuntimeError, match="no_such_module"):
        package.importing("no_such_module").run()
    install = package.Package(suite="import-and-build", what="install")
    assert install.once and not case.once
    assert peers["torch"].refuses(install, CPU) == "no install"
