"""Builds fastattn/_C.abi3.so: the CPU kernels and their bindings. Metadata is in pyproject.toml.

torch is no build requirement (an isolated build would fetch gigabytes of it): install it first and
pass `--no-build-isolation`. Without torch the package is built without kernels and `fastattn info`
says so.
"""

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# The LibTorch stable ABI as of torch 2.11: one library for every later torch and every Python.
TORCH_TARGET = "0x020b000000000000"


def c_extension(cpp_extension):
    csrc = ROOT / "csrc"
    sources = sorted(
        str(p.relative_to(ROOT)) for p in [*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")]
    )
    headers = sorted(str(p.relative_to(ROOT)) for p in [*csrc.glob("*.h"), *csrc.glob("cpu/*.h")])
    # No fused multiply-add that the source doesn't spell: the scalar kernels and the
    # reference agree more closely.
    sanitize = os.environ.get("FASTATTN_SANITIZE", "")  # e.g. "address,undefined"
    compile_args = [
        "-O1" if sanitize else "-O2",
        "-std=c++17",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
    ]
    compile_args += ["-Wno-unused-function", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags = (
        [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        if sanitize
        else ["-g0"]
    )
    return cpp_extension.CppExtension(
        "fastattn._C",
        sources,
        depends=headers,
        extra_compile_args=compile_args + flags,
        extra_link_args=flags,
        py_limited_api=True,
    )


def main():
    try:
        from torch.utils import cpp_extension
    except ImportError:
        print("setup.py: torch is not importable here, building fastattn without its kernels")
        setup()
        return
    setup(
        ext_modules=[c_extension(cpp_extension)],
        cmdclass={"build_ext": cpp_extension.BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
