"""The matrix products of linear cross-entropy, torch's and the CPU kernels' own, against fp64."""

from __future__ import annotations

import contextlib
import itertools
import math

import cpu_isa
import out_dtype
import pytest
import torch
from torch import Tensor

from fastattn import library
from fastattn.backend_cpu import OwnProducts
from fastattn.products import TensorCoreProducts, TorchProducts

PRODUCTS = [TorchProducts()] + ([] if library.load_error() else [OwnProducts()])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matrix(rows: int, cols: int, by_column: bool, dtype: torch.dtype, seed: int) -> Tensor:
    """(rows, cols), part of a wider tensor, with its rows or its columns contiguous."""
    g = torch.Generator().manual_seed(seed)
    shape = (cols, rows + 3) if by_column else (rows, cols + 3)
    wide = torch.randn(shape, generator=g).to(dtype)
    return wide[:, :rows].t() if by_column else wide[:, :cols]


def assert_multiplies(products: TorchProducts, a: Tensor, b: Tensor) -> None:
    exact, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    # Sums in fp32, whose rounding errors grow like the root of the depth, and at most one operand
    # rounded to a shorter dtype on the way.
    mixed = a.dtype != b.dtype
    unit = 2.0**-9 if mixed else 2.0**-24 * (4 + 2 * a.shape[1] ** 0.5)
    for start in (None, torch.randn(exact.shape, device=a.device)):
        out = (
            torch.full_like(exact, math.nan, dtype=torch.float32)
            if start is None
            else start.clone()
        )
        left, right = products.operand(a), products.operand(b)
        products.multiply(left, right, out, accumulate=start is not None)
        expected = exact if start is None else exact + start
        assert out.dtype == torch.float32
        assert ((out - expected).abs() <= unit * (sizes + 1)).all()


@pytest.mark.parametrize("products", PRODUCTS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("cols", [1, 17, 64, 200])
@pytest.mark.parametrize("depth", [0, 1, 129, 300])
def test_layouts(products: TorchProducts, rows: int, cols: int, depth: int) -> None:
    for a_by_column, b_by_column in itertools.product((False, True), repeat=2):
        a = matrix(rows, depth, a_by_column, torch.float32, 1)
        assert_multiplies(products, a, matrix(depth, cols, b_by_column, torch.float32, 2))


@pytest.mark.parametrize("products", PRODUCTS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("a_dtype", DTYPES)
@pytest.mark.parametrize("b_dtype", DTYPES)
def test_dtypes(products: TorchProducts, a_dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    for a_by_column, b_by_column in itertools.product((False, True), repeat=2):
        a = matrix(37, 83, a_by_column, a_dtype, 1)
        assert_multiplies(products, a, matrix(83, 70, b_by_column, b_dtype, 2))


@pytest.mark.parametrize("products", PRODUCTS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_blocks_of_rows_and_columns(products: TorchProducts, dtype: torch.dtype) -> None:
    assert_multiplies(products, torch.randn(2500, 9).to(dtype), torch.randn(9, 1100).to(dtype))


@pytest.mark.parametrize("products", PRODUCTS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deeper_than_is_packed_at_once(products: TorchProducts, dtype: torch.dtype) -> None:
    for a_by_column, b_by_column in itertools.product((False, True), repeat=2):
        a = matrix(300, 5000, a_by_column, dtype, 1)
        assert_multiplies(products, a, matrix(5000, 75, b_by_column, dtype, 2))


@pytest.mark.parametrize("products", PRODUCTS, ids=lambda p: type(p).__name__)
def test_operands_of_any_strides(products: TorchProducts) -> None:
    a, b = torch.randn(6, 20)[:, ::2], torch.randn(1, 7).expand(10, 7)
    assert_multiplies(products, a, b)
    assert_multiplies(products, torch.randn(6, 10), torch.randn(20, 14)[::2, ::2])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_cores(dtype: torch.dtype, device: str) -> None:
    """On the CPU with torch's operators for GPUs replaced."""
    with out_dtype.on_cpu() if device == "cpu" else contextlib.nullcontext():
        for a_by_column, b_by_column in itertools.product((False, True), repeat=2):
            a, b = matrix(37, 83, a_by_column, dtype, 1), matrix(83, 70, b_by_column, dtype, 2)
            assert_multiplies(TensorCoreProducts(), a.to(device), b.to(device))


def test_rows_for_tensor_cores_start_at_multiples_of_16_bytes() -> None:
    like, products = torch.empty(0, device="meta"), TensorCoreProducts()
    for vocab in (1, 7, 8, 50257):
        logits = products.logits(3, vocab, like)
        for dtype in DTYPES:
            gradient = products.gradient(logits, dtype)
            assert gradient.shape == logits.shape == (3, vocab) and gradient.dtype == dtype
            assert gradient.stride(1) == 1
            assert 0 <= gradient.stride(0) * dtype.itemsize - vocab * dtype.itemsize < 16
            assert gradient.stride(0) * dtype.itemsize % 16 == 0


@pytest.mark.skipif(library.load_error() is not None, reason="the kernels are not built")
def test_what_the_kernel_does_not_take() -> None:
    out = torch.empty(4, 4)
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        OwnProducts().multiply(torch.randn(4, 5), torch.randn(6, 4), out)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        OwnProducts().multiply(torch.randn(4, 10)[:, ::2], torch.randn(5, 4), out)
    with pytest.raises(RuntimeError, match="out must be fp32"):
        OwnProducts().multiply(torch.randn(4, 5), torch.randn(5, 4), out.bfloat16())


@pytest.mark.parametrize("isa", cpu_isa.others())
def test_every_instruction_set(isa: str) -> None:
    cpu_isa.run_file(__file__, isa, "not instruction_set and OwnProducts")
