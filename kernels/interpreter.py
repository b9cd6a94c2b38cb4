"""What Triton's interpreter (TRITON_INTERPRET=1) gets wrong or slow, mended: `mend()`.

It runs kernels on CPU tensors in NumPy, where a bfloat16 is its bit pattern in a uint16. Of Triton
3.6 to 3.9: products of bfloat16 multiply these patterns, and fp32 is cut off, not rounded, on its
way to bfloat16 (triton-lang/triton issues 11584, 11585: not supported). Arithmetic on bfloat16
other than products stays wrong; the kernels here do it in fp32. Each call of a helper patches
triton.language again, which takes a hundred times longer than the helper; and tensors are copied to
the CPU and back, the whole storage, where they already are.
"""

import functools
import types

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def running() -> bool:
    """Whether kernels are defined for the interpreter: Triton looks once, on import."""
    return isinstance(tl.max, interpreter.InterpretedFunction)


@functools.cache
def mend() -> None:
    interpreter._convert_float = functools.partial(convert_float, interpreter._convert_float)
    interpreter.InterpreterBuilder.create_dot = create_dot
    languages = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(languages)  # for good
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    interpreter.GridExecutor.__call__ = quietly(interpreter.GridExecutor.__call__)
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None


def convert_float(others, x, source, target, rounding_mode):
    """`_convert_float`; bit patterns in and out, as the interpreter's code takes them."""
    if source == tl.bfloat16 and target == tl.float32:
        return x.astype(np.uint32) << 16
    if source == tl.float32 and target == tl.bfloat16 and rounding_mode is None:
        bits = np.ascontiguousarray(x).view(np.uint32)
        nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(bits & 0x7FFFFFFF > 0x7F800000, np.uint16(0x7FFF), nearest_even)  # NaN
    return others(x, source, target, rounding_mode)


def create_dot(builder, a, b, accumulator, input_precision, max_num_imprecise_acc):
    """As tensor cores do, in more than the operands' precision: which order sums are rounded in
    differs from GPU to GPU."""

    def widened(x):
        if x.dtype.scalar == tl.bfloat16:
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data.astype(np.float64 if x.dtype.scalar == tl.float32 else np.float32)

    total = np.matmul(widened(a), widened(b)) + accumulator.data
    return interpreter.TensorHandle(total.astype(accumulator.data.dtype), accumulator.dtype.scalar)


def quietly(run):
    """NaN and infinity are no reason for NumPy to warn."""

    @functools.wraps(run)
    def wrapped(*args, **kwargs):
        with np.errstate(all="ignore"):
            return run(*args, **kwargs)

    return wrapped
