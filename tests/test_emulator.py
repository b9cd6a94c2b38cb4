"""The emulator itself: every primitive's meaning, and that faults are found and none invented."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

import pytest
import torch
from emulator import build
from emulator.runtime import EmulatorError, Library
from torch import Tensor

SOURCES = ["tests/emulator/test_kernels.cu", "tests/emulator/faulty_kernels.cu"]
COMPLETIONS = ["eager", "lazy", *(f"random,seed={seed}" for seed in range(1, 5))]


class Arguments(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p * 4), ("number", ctypes.c_int * 4)]


class Kernels(Library):
    def run(
        self,
        name: str,
        read: Sequence[Tensor] = (),
        write: Sequence[Tensor] = (),
        numbers: Sequence[int] = (),
        grid: tuple[int, int, int] = (1, 1, 1),
        threads: int = 32,
        shared_bytes: int = 0,
        options: str = "",
    ) -> None:
        """Starts a kernel of SOURCES with pointers to `read`, then `write`."""
        tensors = [*read, *write]
        arguments = Arguments()
        arguments.pointer[: len(tensors)] = [t.data_ptr() for t in tensors]
        arguments.number[: len(numbers)] = list(numbers)
        reads = {f"in{i}": t for i, t in enumerate(read)}
        writes = {f"out{i}": t for i, t in enumerate(write)}
        self.set_options(options)
        with self.buffers(reads, writes):
            where = (ctypes.c_int * 3)(*grid)
            call = (name.encode(), where, threads, shared_bytes, ctypes.byref(arguments))
            self.call("run_kernel", *call)

    def fault(self, name: str, **arguments: object) -> str:
        """What the emulator says about a kernel that it must find fault with."""
        with pytest.raises(EmulatorError) as caught:
            self.run(name, **arguments)  # type: ignore[arg-type]
        return str(caught.value)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(build.build("emulator_test", SOURCES))


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


# --- what instructions mean -----------------------------------------------------------------------


def test_indices(kernels: Kernels) -> None:
    grid, threads = (3, 2, 2), 64
    out = zeros(2, 2, 3, threads, 4, 3)
    kernels.run("indices", write=[out], grid=grid, threads=threads, options="seed=5")
    for z, y, x, thread in [(0, 0, 0, 0), (1, 0, 2, 63), (1, 1, 1, 7)]:
        want = [[thread, 0, 0], [x, y, z], [threads, 1, 1], list(grid)]
        assert out[z, y, x, thread].tolist() == want


@pytest.mark.parametrize("width", [1, 4, 16, 32])
def test_shuffles(kernels: Kernels, width: int) -> None:
    operand = torch.randint(0, 32, (32,), dtype=torch.int32)
    out = zeros(4, 32)
    kernels.run("shuffles", [operand], [out], [width])
    for lane, x in enumerate(operand.tolist()):
        first = lane // width * width
        last = first + width - 1
        by_index = first + x % width
        up = lane - x if lane - x >= first else lane
        down = lane + x if lane + x <= last else lane
        xor = lane ^ x if lane ^ x <= last else lane
        assert out[:, lane].tolist() == [by_index, up, down, xor]


def test_shuffle_of_eight_bytes(kernels: Kernels) -> None:
    x, out = torch.randn(32, dtype=torch.float64), zeros(32, dtype=torch.float64)
    kernels.run("shuffle_double", [x], [out])
    assert torch.equal(out, x.flip(0))


@pytest.mark.parametrize("bits", [0, 1 << 31, 0x5A5A_0FF0, 2**32 - 1])
def test_votes(kernels: Kernels, bits: int) -> None:
    x, out = torch.tensor([bits >> i & 1 for i in range(32)], dtype=torch.int32), zeros(3, 32)
    kernels.run("votes", [x], [out])
    assert (out[0].to(torch.int64) % 2**32 == bits).all()
    assert (out[1] == (bits != 0)).all() and (out[2] == (bits == 2**32 - 1)).all()


def test_ldmatrix(kernels: Kernels) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = zeros(2, 4, 32)
    kernels.run("ldmatrix", [matrices], [out], shared_bytes=512)
    low, high = out & 0xFFFF, out >> 16
    for i in range(4):
        for lane in range(32):
            group, pair = lane // 4, 2 * (lane % 4)
            for transposed, m in enumerate((matrices[i], matrices[i].T)):
                got = (int(low[transposed, i, lane]), int(high[transposed, i, lane]))
                assert got == (int(m[group, pair]), int(m[group, pair + 1]))


@pytest.mark.parametrize("options", COMPLETIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_m16n8k16(kernels: Kernels, dtype: torch.dtype, options: str) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    want = d.double() + a.double() @ b.double().T
    name = "mma_k16_bf16" if dtype == torch.bfloat16 else "mma_k16_fp16"
    kernels.run(name, [a, b], [d], shared_bytes=768, options=options)
    torch.testing.assert_close(d.double(), want, atol=1e-5, rtol=1e-5)


def test_mma_m16n8k8(kernels: Kernels) -> None:
    a, b, d = torch.randn(16, 8).half(), torch.randn(8, 8).half(), torch.randn(16, 8)
    want = d.double() + a.double() @ b.double().T
    kernels.run("mma_k8", [a, b], [d])
    torch.testing.assert_close(d.double(), want, atol=1e-5, rtol=1e-5)


def test_conversions_round_as_torch_does(kernels: Kernels) -> None:
    every_half = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every_half = every_half[~every_half.isnan()]
    nexts = torch.nextafter(every_half, torch.tensor(torch.inf))
    exact_ties = (every_half[:-1] + every_half[1:]) / 2
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65519.99, 65520.0, 1e-8, 3.4e38])
    x = torch.cat([every_half, nexts, exact_ties, special, torch.randn(5000) * 1e-5])
    x = x[~x.isnan()]
    x = x[: len(x) // 2 * 2].contiguous()
    outs = [zeros(len(x), dtype=t) for t in (torch.bfloat16, torch.float16, torch.float32)]
    kernels.run("conversions", [x], outs, [len(x)], (-(-len(x) // 512), 1, 1), 256)
    assert torch.equal(outs[0], x.bfloat16())
    assert torch.equal(outs[1], x.half())
    assert torch.equal(outs[2], x.half().float())


def test_conversions_keep_nan(kernels: Kernels) -> None:
    x = torch.tensor([torch.nan, -torch.nan])
    outs = [zeros(2, dtype=t) for t in (torch.bfloat16, torch.float16, torch.float32)]
    kernels.run("conversions", [x], outs, [2])
    assert all(out.isnan().all() for out in outs)


def test_exponentials(kernels: Kernels) -> None:
    x = torch.cat(
        [torch.linspace(-125.0, 127.0, 26), torch.tensor([-torch.inf, 0, -140, 1e-42, 1, -1e38])]
    )
    out = zeros(3, 32, dtype=torch.float32)
    kernels.run("exponentials", [x], [out])
    power, log, inverse = out
    torch.testing.assert_close(power[:26], torch.exp2(x[:26]), rtol=3e-7, atol=0)
    assert power[26:].tolist() == [0, 1, 0, 1, 2, 0]  # denormals are flushed, in and out
    positive = x[:26] > 0
    torch.testing.assert_close(log[:26][positive], torch.log2(x[:26][positive]))
    assert log[27] == log[29] == -torch.inf and log[30] == 0
    torch.testing.assert_close(inverse[:26], 1 / x[:26])
    assert inverse[26:].tolist() == [0, torch.inf, pytest.approx(-1 / 140), torch.inf, 1, 0]


def test_coarse_arithmetic(kernels: Kernels) -> None:
    """Approximations are off by what the PTX ISA allows, products' sums cut off."""
    x = torch.linspace(-3.1, 3.3, 32)
    exact, coarse = zeros(3, 32, dtype=torch.float32), zeros(3, 32, dtype=torch.float32)
    kernels.run("exponentials", [x], [exact])
    kernels.run("exponentials", [x], [coarse], options="coarse=1")
    steps = (coarse.view(torch.int32) - exact.view(torch.int32))[:, x > 0]
    assert set(steps[0].tolist()) == {-2, 2} and set(steps[1:].flatten().tolist()) == {-1, 1}
    a, b = torch.zeros(16, 16), torch.zeros(16, 8)
    a[:, 0], b[0] = 1.0, 1.0
    a[:, 1], b[1] = -(2.0**-12), 1.5 * 2.0**-12  # 1.5 of one's next lower bits: one bit is lost
    sums = {}
    for options in ("", "coarse=1"):
        d = torch.zeros(16, 8)
        kernels.run("mma_k16_bf16", [a.bfloat16(), b.T.contiguous().bfloat16()], [d],
                    shared_bytes=768, options=options)  # fmt: skip
        sums[options] = float(d[3, 3])
    assert sums == {"": 1 - 2.0**-23, "coarse=1": 1.0}


@pytest.mark.parametrize("options", COMPLETIONS)
def test_cp_async_fills_with_zeros(kernels: Kernels, options: str) -> None:
    x = torch.randint(1, 255, (17, 16), dtype=torch.uint8)
    out = torch.full_like(x, 7)
    kernels.run("copy_bytes", [x], [out], shared_bytes=17 * 16, options=options)
    inside = torch.arange(16)[None] < torch.arange(17)[:, None]
    assert torch.equal(out, x * inside)


@pytest.mark.parametrize("options", COMPLETIONS)
def test_cp_async_groups(kernels: Kernels, options: str) -> None:
    x, out = torch.randn(3, 32), zeros(3, 32, dtype=torch.float32)
    kernels.run("copy_groups", [x], [out], [1], shared_bytes=384, options=options)
    assert torch.equal(out[:2], x[:2])
    said = kernels.fault(
        "copy_groups", read=[x], write=[out], numbers=[0], shared_bytes=384, options=options
    )
    assert "isn't waited for" in said


def test_what_is_not_waited_for_is_nan(kernels: Kernels) -> None:
    x, out = torch.randn(64, 4), zeros(64, 4, dtype=torch.float32)
    arguments = {"read": [x], "write": [out], "threads": 64, "shared_bytes": 1024}
    kernels.fault("copy_and_read", numbers=[1], options="lazy", **arguments)
    assert out.isnan().all()
    kernels.fault("copy_and_read", numbers=[1], options="eager", **arguments)
    assert torch.equal(out, x)
    kernels.fault("copy_and_read", numbers=[1], options="random,seed=1", **arguments)
    assert 0 < out.isnan().sum() < out.numel()


def test_atomics(kernels: Kernels) -> None:
    blocks, threads = 3, 64
    n, out = blocks * threads, zeros(7, dtype=torch.int64)
    kernels.run("atomics", write=[out], grid=(blocks, 1, 1), threads=threads)
    assert out[0:1].view(torch.float32)[0] == n / 2
    assert out[1:3].view(torch.int32)[::2].tolist() == [-n * (n - 1) // 2, n * (n - 1) // 2]
    assert out[3:6].tolist() == [n << 33, n - 1, 7]
    assert 1 <= out[6] <= n


# --- order within a block: races are found, and not invented --------------------------------------

NOTHING, AFTER_WRITE, BEFORE_REWRITE = range(3)  # what is missing


@pytest.mark.parametrize("options", ["", "seed=1", "seed=2", "seed=3,races=0"])
def test_barriers_order(kernels: Kernels, options: str) -> None:
    out = zeros(96)
    for name in ("neighbours", "lanes"):
        kernels.run(name, write=[out], threads=96, shared_bytes=384, options=options)
        assert out.tolist() == list(range(2, 98))
    kernels.run("halves", write=[out[:16]], threads=32, shared_bytes=64, options=options)
    assert out[:16].view(torch.int16).tolist() == list(range(32))
    kernels.run("atomics_on_shared", write=[out], threads=64, shared_bytes=4, options=options)
    assert out[0] == 64


@pytest.mark.parametrize("options", ["", "seed=1"])
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("neighbours", AFTER_WRITE),
        ("neighbours", BEFORE_REWRITE),
        ("lanes", AFTER_WRITE),
        ("lanes", BEFORE_REWRITE),
        ("halves", AFTER_WRITE),
        ("atomics_on_shared", AFTER_WRITE),
        ("both_write", AFTER_WRITE),
    ],
)
def test_missing_barriers(kernels: Kernels, name: str, missing: int, options: str) -> None:
    arguments = {"write": [zeros(96)], "threads": 96, "shared_bytes": 384, "options": options}
    said = kernels.fault(name, numbers=[missing], **arguments)
    # Which of two accesses comes too early depends on the schedule, that there is a race doesn't.
    assert re.search(
        r"block \(0, 0, 0\) thread \d+: race: (load|store|atomicAdd) of byte \d+ of shared memory "
        r"isn't ordered after the (read|write) of thread \d+ at faulty_kernels.cu:\d+",
        said,
    ), said


@pytest.mark.parametrize("seed", range(6))
def test_named_barriers(kernels: Kernels, seed: int) -> None:
    out = zeros(96)
    arguments = {"write": [out], "threads": 64, "shared_bytes": 128, "options": f"seed={seed}"}
    kernels.run("producer_consumer", numbers=[NOTHING], **arguments)
    assert out.tolist() == list(range(96))
    assert "race" in kernels.fault("producer_consumer", numbers=[AFTER_WRITE], **arguments)
    # A producer that doesn't wait overwrites what is being read, or fills barrier 1 on its own.
    said = kernels.fault("producer_consumer", numbers=[BEFORE_REWRITE], **arguments)
    assert "race" in said or "deadlock" in said


def test_named_barriers_that_do_not_fit(kernels: Kernels) -> None:
    said = kernels.fault("wrong_named_barriers", numbers=[0], threads=96)
    assert re.search(r"barrier 3 of \d+ threads and of \d+", said)
    said = kernels.fault("wrong_named_barriers", numbers=[1], threads=96)
    assert "deadlock" in said and "32 lanes wait in a named barrier" in said


@pytest.mark.parametrize("options", COMPLETIONS)
def test_cp_async_needs_a_wait_and_a_barrier(kernels: Kernels, options: str) -> None:
    x, out = torch.randn(64, 4), zeros(64, 4, dtype=torch.float32)
    arguments = {"read": [x], "write": [out], "threads": 64, "shared_bytes": 1024}
    kernels.run("copy_and_read", numbers=[0, 1], options=options, **arguments)
    assert torch.equal(out, x)
    kernels.run("copy_and_read", numbers=[2, 0], options=options, **arguments)  # its own part
    assert torch.equal(out, x)
    unwaited = kernels.fault("copy_and_read", numbers=[1, 1], options=options, **arguments)
    assert re.search(r"load touches byte \d+ of shared memory, where a cp.async of thr", unwaited)
    unordered = kernels.fault("copy_and_read", numbers=[2, 1], options=options, **arguments)
    assert "race" in unordered or "isn't waited for" in unordered


def test_uninitialised_shared_memory(kernels: Kernels) -> None:
    out = zeros(32, dtype=torch.float32)
    said = kernels.fault("read_unwritten", write=[out], shared_bytes=128)
    assert "load reads byte 0 of shared memory, which nobody has written" in said
    assert out.isnan().all()


def test_results_do_not_depend_on_the_schedule(kernels: Kernels) -> None:
    x, out = torch.randn(7, 256), zeros(7, dtype=torch.float32)
    results = []
    for options in ["eager", "lazy", *(f"random,seed={seed}" for seed in range(1, 13))]:
        kernels.run("block_sums", [x], [out], (), (7, 1, 1), 256, 32, options)
        results.append(out.clone())
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], x.sum(1))


# --- bounds and alignment -------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "races=0"])
def test_global_bounds(kernels: Kernels, options: str) -> None:
    x, out = torch.randn(16), zeros(16, dtype=torch.float32)
    arguments = {"read": [x], "write": [out], "options": options}
    kernels.run("read_and_write", numbers=[15, 3], **arguments)
    assert out[3] == x[15]
    for index, name in ((16, "in0"), (-1, "in0")):
        said = kernels.fault("read_and_write", numbers=[index, 3], **arguments)
        place = f"byte {4 * index} of {name}, which has 64"
        assert re.search(
            r"in read_and_write\n.*block \(0, 0, 0\) thread 5: load of 4 bytes at 0x\w+, "
            rf"outside all buffers: {place} at faulty_kernels.cu:\d+",
            said,
        ), said
    assert "store of 4 bytes" in kernels.fault("read_and_write", numbers=[0, 16], **arguments)
    backwards = {"read": [out], "write": [x], "options": options}
    kernels.run("read_and_write", numbers=[0, 0], **backwards)


def test_read_only_buffers(kernels: Kernels) -> None:
    x, y = torch.randn(16), torch.randn(16)
    said = kernels.fault("read_and_write", read=[x, y], numbers=[0, 2])
    assert "store to byte 8 of in1, which is only read" in said


def test_no_buffers(kernels: Kernels) -> None:
    x = torch.randn(16)
    kernels.set_options()
    arguments = Arguments()
    arguments.pointer[0] = arguments.pointer[1] = x.data_ptr()
    with pytest.raises(EmulatorError, match="no buffer of global memory has been named"):
        grid = (ctypes.c_int * 3)(1, 1, 1)
        kernels.call("run_kernel", b"read_and_write", grid, 32, 0, ctypes.byref(arguments))


def test_cp_async_bounds(kernels: Kernels) -> None:
    x = torch.zeros(64, dtype=torch.uint8)
    arguments = {"read": [x], "shared_bytes": 64}
    kernels.run("copy_from", numbers=[48, 48, 16], **arguments)
    kernels.run("copy_from", numbers=[64, 0, 0], **arguments)  # reads nothing
    assert "outside all buffers" in kernels.fault("copy_from", numbers=[64, 0, 1], **arguments)
    assert "outside shared" in kernels.fault("copy_from", numbers=[0, 64, 16], **arguments)
    assert "not aligned to 16" in kernels.fault("copy_from", numbers=[8, 0, 8], **arguments)
    assert "not aligned to 16" in kernels.fault("copy_from", numbers=[0, 8, 16], **arguments)
    assert "reads 17 of 16" in kernels.fault("copy_from", numbers=[0, 0, 17], **arguments)


def test_shared_bounds(kernels: Kernels) -> None:
    for index in (16, -1):
        said = kernels.fault("write_shared", numbers=[index], shared_bytes=64)
        place = f"store of 4 bytes at byte {4 * index} of shared memory, which has 64"
        outside = "outside all buffers" if index < 0 else place
        assert place in said or outside in said or "no buffer" in said
    said = kernels.fault("write_shared", shared_bytes=65536, options="shared_limit=65535")
    assert "65536 bytes of shared memory, more than the 65535 there are" in said


def test_alignment(kernels: Kernels) -> None:
    x, out = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    base = -x.data_ptr() % 16
    kernels.run("misaligned", [x], [out], [base])
    said = kernels.fault("misaligned", read=[x], write=[out], numbers=[base + 8])
    assert re.search(r"isn't aligned to the 16 bytes .* at faulty_kernels.cu:\d+", said), said
    said = kernels.fault("misaligned_row", numbers=[8], shared_bytes=64)
    assert "ldmatrix: the row of lane 0 isn't aligned to 16 bytes" in said


# --- lanes and warps that don't meet --------------------------------------------------------------


def test_deadlocks_tell_who_waits_where(kernels: Kernels) -> None:
    said = kernels.fault("barrier_in_a_branch", threads=64)
    assert "deadlock" in said
    assert re.search(r"warp 0: 16 lanes wait in __syncthreads \(line \d+\); 16 lanes wait", said)
    said = kernels.fault("shuffle_of_the_living", write=[zeros(32)])
    assert re.search(r"16 lanes have exited; 16 lanes wait in a shuffle \(line \d+\)", said), said


def test_diverged_warps(kernels: Kernels) -> None:
    said = kernels.fault("different_shuffles", write=[zeros(32)])
    assert "meet in different instructions" in said
    assert "only full masks" in kernels.fault("part_of_a_mask", write=[zeros(32)])


def test_barriers_wait_for_the_living_only(kernels: Kernels) -> None:
    out = zeros(96)
    kernels.run("barrier_of_the_living", write=[out], threads=96)
    assert out.view(3, 32).sum(1).tolist() == [32, 0, 32]


@pytest.mark.parametrize("threads", [0, 33, 1056])
def test_block_sizes(kernels: Kernels, threads: int) -> None:
    assert f"a block of {threads} threads" in kernels.fault("both_write", threads=threads)


# --- order between blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "seed=1", "seed=2", "co_scheduled=1,seed=3"])
def test_races_between_blocks(kernels: Kernels, options: str) -> None:
    out = zeros(8)
    arguments = {"write": [out], "grid": (8, 1, 1), "options": options}
    kernels.run("blocks_write", numbers=[1], **arguments)
    said = kernels.fault("blocks_write", numbers=[2], **arguments)
    assert re.search(r"race: store of byte \d+ of out0 isn't ordered after the write of bl", said)
    said = kernels.fault("blocks_read", write=[out], grid=(2, 1, 1), options=options)
    assert re.search(r"race: \w+ of byte 0 of out0 isn't ordered after the \w+ of block", said)


@pytest.mark.parametrize("options", ["", "seed=1", "seed=2", "co_scheduled=1,seed=3"])
def test_fences_and_atomics_order_blocks(kernels: Kernels, options: str) -> None:
    def outputs() -> list[Tensor]:
        return [zeros(4, 64), zeros(1), zeros(1)]

    arguments = {"grid": (4, 1, 1), "threads": 64, "shared_bytes": 4, "options": options}
    out = outputs()
    kernels.run("last_block_sums", write=out, numbers=[0], **arguments)
    assert out[2] == 4 * 64 * 63 // 2
    for missing in (1, 2):
        said = kernels.fault("last_block_sums", write=outputs(), numbers=[missing], **arguments)
        assert re.search(r"race: load of byte \d+ of out0 isn't ordered after the write", said)


def test_blocks_that_wait_for_each_other(kernels: Kernels) -> None:
    arguments = {"grid": (5, 1, 1)}
    for seed in range(4):
        out = [zeros(5), zeros(5)]
        options = f"co_scheduled=1,seed={seed}"
        kernels.run("wait_for_the_next", (), out, [seed % 2], options=options, **arguments)
        assert out[1].tolist() == [5, 4, 3, 2, 1]
    said = kernels.fault("wait_for_the_next", write=[zeros(5), zeros(5)], **arguments)
    assert "polls in a row" in said


# --- planted faults -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["neighbours", "lanes", "halves", "copy_and_read"])
def test_every_barrier_is_missed(kernels: Kernels, name: str) -> None:
    """In kernels that have none too many: `copy_and_read` waits once more as it exits."""
    x, out = torch.randn(64, 4), zeros(64, 4)
    read, numbers = ([x], [0, 1]) if name == "copy_and_read" else ([], [0])
    arguments = {"read": read, "write": [out], "numbers": numbers, "threads": 64}
    arguments |= {"shared_bytes": 1024}
    kernels.passed_places()
    kernels.run(name, options="without=?", **arguments)
    places = kernels.passed_places()
    assert len(places) == {"halves": 1, "copy_and_read": 3}.get(name, 2), places
    for place in places[: 2 if name == "copy_and_read" else None]:
        assert place.startswith("faulty_kernels.cu:")
        kernels.fault(name, options=f"without={place}", **arguments)


# --- options, portable fibers ---------------------------------------------------------------------


def test_options(kernels: Kernels) -> None:
    for text in ("slow", "seed", "seed=x", "seed=3x", "races="):
        with pytest.raises(ValueError, match="emulator: "):
            kernels.set_options(text)
    kernels.set_options("eager,seed=18446744073709551615,races=0,,co_scheduled=0")


def test_fibers_of_ucontext() -> None:
    """Fibers switch without assembly where there is none for the machine."""
    flag = "-DFASTATTN_EMULATOR_UCONTEXT"
    portable = Kernels(build.build("emulator_test_ucontext", SOURCES, emulator_flags=[flag]))
    test_results_do_not_depend_on_the_schedule(portable)
    test_deadlocks_tell_who_waits_where(portable)
    test_blocks_that_wait_for_each_other(portable)
    test_barriers_order(portable, "seed=1")
