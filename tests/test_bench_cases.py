"""The benchmarks' cases and peers: each peer here gives what fp64 says, on small shapes."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pretend_device
import pytest
import torch
import torch.nn.functional as F

import fastattn
from benchmarks import attention_packages, decode, losses, package, suites, train_step
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


def test_dropout_has_no_exact_result():
    case = Attention(suite="features", dtype=FP32, **SHAPE, extra="dropout")
    assert case.exact(case.inputs(CPU)) == {}


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


def packed(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, -1), **options):
    options = {"window": window_size} | options
    return fastattn.attention_varlen(
        q, k, v, cu_q, cu_k, max_q, max_k, backend="reference", **options
    )


def with_kv_cache(q, k, v, cache_seqlens, block_table=None, page_table=None):
    table = block_table if page_table is None else page_table
    options = {"cache_seqlens": cache_seqlens, "block_table": table}
    return fastattn.attention_decode(q, k, v, backend="reference", **options)


class Prefill:
    def __init__(self, workspace, layout):
        assert layout == "NHD"

    def plan(self, ends_q, ends_k, heads, kv_heads, head_dim, **options):
        self.ends, self.options = ends_q, options

    def run(self, q, k, v):
        o, longest = self.options, int(self.ends.diff().max())
        window = (o["window_left"], 0) if o["causal"] else (-1, -1)
        options = {"window": window, "softcap": o["logits_soft_cap"]}
        return packed(q, k, v, self.ends, self.ends, longest, longest, **options)


class PagedDecode:
    def __init__(self, workspace, layout, use_tensor_cores):
        pass

    def plan(self, ends, table, last, heads, kv_heads, head_dim, page_size, **dtypes):
        batch = len(ends) - 1
        self.table = table.view(batch, -1)
        self.lengths = (ends.diff() - 1) * page_size + last

    def run(self, q, kv):
        return with_kv_cache(q[:, None], *kv, self.lengths, self.table)[:, 0]


@pytest.fixture
def packages(monkeypatch):
    """Modules with the packages' names and signatures, and our reference inside."""

    def module(name, **contents):
        fake = ModuleType(name)
        vars(fake).update(contents)
        monkeypatch.setitem(sys.modules, name, fake)
        return fake

    two = {"flash_attn_func": bottom_right, "flash_attn_varlen_func": packed}
    three = two | {"flash_attn_with_kvcache": with_kv_cache}
    four = {name: lambda *a, f=f, **o: (f(*a, **o), None) for name, f in two.items()}
    cute = module("flash_attn.cute", **four)
    module("flash_attn", **three, cute=cute)
    module("flash_attn_interface", **three)
    module(
        "flashinfer",
        BatchPrefillWithRaggedKVCacheWrapper=Prefill,
        BatchDecodeWithPagedKVCacheWrapper=PagedDecode,
    )
    module("liger_kernel")
    module("liger_kernel.transformers")
    functional = module("liger_kernel.transformers.functional")
    functional.liger_cross_entropy = F.cross_entropy
    functional.liger_fused_linear_cross_entropy = losses.textbook
    sys.modules["liger_kernel.transformers"].functional = functional
    module("cut_cross_entropy", linear_cross_entropy=losses.textbook)
    module("quack")
    simple = SimpleNamespace(
        cross_entropy=lambda z, t, reduction, inplace_backward: F.cross_entropy(z, t),
        linear=lambda x, w, t, reduction: losses.textbook(x, w, t),
    )
    module("quack.cross_entropy", cross_entropy=simple.cross_entropy)
    module("quack.linear_cross_entropy", chunked_linear_cross_entropy=simple.linear)


NAMES = ("flash-attn 2", "flash-attn 3", "flash-attn 4", "FlashInfer")
NAMES += ("Liger", "cut-cross-entropy", "quack")


@pytest.mark.parametrize("name", NAMES)
def test_adapters_pass_on_what_a_case_says(name, packages):
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
