"""What the emulator adds for sm_90: mbarriers, TMA, wgmma, setmaxnreg, the asynchronous proxy."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

import pytest
import torch
from emulator import build
from emulator.runtime import EmulatorError
from test_emulator import COMPLETIONS, Kernels, zeros
from torch import Tensor

SOURCES = ["tests/emulator/test_kernels.cu", "tests/emulator/test_kernels_sm90.cu"]


class Sm90Kernels(Kernels):
    def map(self, t: Tensor, box: tuple[int, int], swizzled: bool = True) -> Tensor:
        """The CUtensorMap of a matrix."""
        out = torch.zeros(128, dtype=torch.uint8)
        sizes = (*t.shape, t.stride(0) * t.element_size(), *box, int(swizzled))
        pointers = ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(t.data_ptr())
        self.call("make_tensor_map", pointers[0], t.element_size(), pointers[1], *sizes)
        return out

    def start(
        self,
        name: str,
        maps: Sequence[Tensor],
        tensors: Sequence[Tensor] = (),
        results: Sequence[Tensor] = (),
        **arguments: object,
    ) -> None:
        """Starts a kernel with pointers to `maps`, which may touch what is behind them."""
        with self.buffers(
            {f"tensor{i}": t for i, t in enumerate(tensors)},
            {f"result{i}": t for i, t in enumerate(results)},
        ):
            self.run(name, maps, **arguments)  # type: ignore[arg-type]

    def faults(self, *positional: object, **arguments: object) -> str:
        with pytest.raises(EmulatorError) as caught:
            self.start(*positional, **arguments)  # type: ignore[arg-type]
        return str(caught.value)


@pytest.fixture(scope="module")
def kernels() -> Sm90Kernels:
    return Sm90Kernels(build.build("emulator_test_sm90", SOURCES))


# --- TMA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", COMPLETIONS)
@pytest.mark.parametrize("swizzled", [False, True])
def test_tma_load_fills_with_zeros(kernels: Sm90Kernels, swizzled: bool, options: str) -> None:
    x = torch.randn(21, 72).bfloat16()[:, :70]
    map, out = kernels.map(x, (16, 64), swizzled), zeros(16, 64, dtype=torch.bfloat16)
    for row, column in ((0, 0), (3, 8), (16, 64), (-5, 0), (40, 0)):
        run = {"numbers": [column, row], "threads": 64, "shared_bytes": 3072, "options": options}
        kernels.start("load_box", [map, out], [x], [out], **run)
        rows, columns = torch.arange(row, row + 16), torch.arange(column, column + 64)
        inside = ((rows >= 0) & (rows < 21))[:, None] & (columns < 70)
        want = x[rows.clamp(0, 20)][:, columns.clamp(0, 69)] * inside
        got = out.view(16, 8, 8)
        if swizzled:  # piece p of row r lies at p ^ r % 8
            pieces = torch.arange(8) ^ (torch.arange(16)[:, None] % 8)
            got = got.gather(1, pieces[:, :, None].expand(-1, -1, 8))
        assert torch.equal(got.reshape(16, 64), want)


@pytest.mark.parametrize("options", COMPLETIONS)
@pytest.mark.parametrize("adds", [False, True])
def test_tma_store(kernels: Sm90Kernels, adds: bool, options: str) -> None:
    x, out = torch.randn(16, 32), torch.ones(25, 32)
    run = {"threads": 64, "shared_bytes": 2048, "options": options}
    map = kernels.map(out, (16, 32), swizzled=False)
    kernels.start("store_box", [x, map], [], [out], numbers=[3, adds], **run)
    want = torch.ones(25, 32)
    if adds:
        want[3:19] += x
        want[3:19] += 2 * x
    else:
        want[3:19] = x
        want[19:] = 2 * x[:6]  # what lies outside isn't stored
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    said = kernels.faults("store_box", [x, map], [], [out], numbers=[3, adds, 1], **run)
    assert re.search(r"race: store .* isn't ordered after the read of an asynchronous", said), said


def test_tensor_maps_that_the_driver_refuses(kernels: Sm90Kernels) -> None:
    x = torch.zeros(8, 72, dtype=torch.bfloat16)
    for t, box, what in (
        (x[:, 1:], (8, 64), "aligned to 16"),
        (x[:, :68].contiguous(), (8, 64), "a stride of 136 bytes"),
        (x, (257, 64), "a box of 257"),
        (x, (8, 12), "multiple of 16"),
        (x, (8, 72), "longer than the swizzle"),
    ):
        with pytest.raises(EmulatorError, match=what):
            kernels.map(t, box)


def test_tma_bounds(kernels: Sm90Kernels) -> None:
    x, out = torch.randn(16, 64).bfloat16(), zeros(16, 64, dtype=torch.bfloat16)
    map = kernels.map(x, (16, 64))
    run = {"numbers": [0, 0], "threads": 64}
    assert "which has 64" in kernels.faults(
        "load_box", [map, out], [x], [out], shared_bytes=64, **run
    )
    said = kernels.faults("load_box", [map, out], [x[:8]], [out], shared_bytes=3072, **run)
    assert "outside all buffers" in said


# --- wgmma ----------------------------------------------------------------------------------------

PRODUCTS = ("k_k_64", "k_k_112", "k_mn_96", "mn_k_64", "mn_mn_128", "registers_k_80",
            "registers_mn_256")  # fmt: skip


def product(name: str) -> tuple[list[Tensor], Tensor, Tensor, str]:
    """Operands as `product` wants them, its output, and what that must be."""
    *majors, n = name.split("_")
    dtype = (
        torch.float16 if name in ("k_k_112", "mn_mn_128", "registers_mn_256") else torch.bfloat16
    )
    a, b = torch.randn(64, 64).to(dtype), torch.randn(64, int(n)).to(dtype)
    want = a.double() @ b.double() + (1 if majors[0] == "registers" else 0)
    a = a.T.contiguous() if majors[0] == "mn" else a
    b = b if majors[1] == "mn" else b.T.contiguous()
    return [a, b], zeros(64, int(n), dtype=torch.float32), want, "product_" + name


@pytest.mark.parametrize("options", COMPLETIONS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_wgmma(kernels: Sm90Kernels, name: str, options: str) -> None:
    operands, out, want, kernel = product(name)
    maps = [kernels.map(t, (t.shape[0], 64)) for t in operands]
    run = {"threads": 128, "shared_bytes": 48 << 10, "options": options}
    kernels.start(kernel, [*maps, out], operands, [out], **run)
    torch.testing.assert_close(out.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", COMPLETIONS)
def test_accumulators_in_flight_are_nan(kernels: Sm90Kernels, options: str) -> None:
    operands, out, _, kernel = product("k_k_64")
    maps = [kernels.map(t, (64, 64)) for t in operands]
    run = {"threads": 128, "shared_bytes": 48 << 10, "options": options, "numbers": [1]}
    kernels.start(kernel, [*maps, out], operands, [out], **run)
    assert out.isnan().all()


# --- a producer and a consumer --------------------------------------------------------------------


def pipeline(kernels: Sm90Kernels, options: str) -> None:
    a, b, out = torch.randn(5, 64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), zeros(64, 64)
    out = out.float()
    maps = [kernels.map(t, (64, 64)) for t in (a.view(320, 64), b)]
    maps += [zeros(1), kernels.map(out, (64, 64), swizzled=False)]
    run = {"numbers": [5], "threads": 384, "shared_bytes": 42 << 10, "options": options}
    kernels.start("pipeline", maps, [a, b], [out], **run)
    torch.testing.assert_close(
        out.double(), (a.double() @ b.double().T).sum(0), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("options", [*COMPLETIONS, "races=0"])
def test_pipeline(kernels: Sm90Kernels, options: str) -> None:
    pipeline(kernels, options)


def test_every_wait_of_a_pipeline_is_missed(kernels: Sm90Kernels) -> None:
    kernels.passed_places()
    pipeline(kernels, "without=?")
    places = kernels.passed_places()
    assert len(places) == 11, places
    for place in places:
        with pytest.raises(EmulatorError):
            pipeline(kernels, f"without={place}")
            pytest.fail(f"nothing is wrong without {place}")


def test_wrong_uses(kernels: Sm90Kernels) -> None:
    run = {"threads": 384, "shared_bytes": 64}
    said = kernels.fault("wrong_uses", numbers=[0], **run)
    assert "deadlock" in said and "wait in setmaxnreg.inc" in said
    said = kernels.fault("wrong_uses", numbers=[1], **run)
    assert "deadlock" in said and "wait in mbarrier.try_wait" in said
    assert "no mbarrier at byte 8" in kernels.fault("wrong_uses", numbers=[2], **run)
    assert "deadlock" in kernels.fault("wrong_uses", numbers=[3], **run)
    assert "is one already" in kernels.fault("wrong_uses", numbers=[4], **run)


def test_barriers_must_be_seen(kernels: Sm90Kernels) -> None:
    run = {"threads": 64, "shared_bytes": 64}
    kernels.run("barrier_without_sync", numbers=[0], **run)
    said = kernels.fault("barrier_without_sync", numbers=[1], **run)
    assert "mbarrier.arrive at byte 0 of shared memory isn't ordered after mbarrier.init" in said
