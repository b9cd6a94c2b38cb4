"""Builds fastattn/_C.abi3.so, the CPU kernels, and fastattn/_cuda.abi3.so, the CUDA kernels.

Metadata is in pyproject.toml.

torch is no build requirement (an isolated build would fetch gigabytes of it): install it first and
pass `--no-build-isolation`. Without torch the package is built without kernels and `fastattn info`
says so.

The CUDA kernels are built where nvcc is found and torch is a CUDA build; FASTATTN_CUDA=1 builds
them wherever nvcc is, with no need of a GPU, FASTATTN_CUDA=0 nowhere. csrc/cuda/nvcc.py has the
other settings.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402


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
        *nvcc.BINDINGS_FLAGS,
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Wno-unused-function",
    ]
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


def why_no_cuda(torch):
    """None, or why the CUDA kernels are not built."""
    wanted = os.environ.get("FASTATTN_CUDA")
    if wanted == "0":
        return "FASTATTN_CUDA=0"
    if nvcc.find() is None:
        if wanted == "1":
            sys.exit("setup.py: FASTATTN_CUDA=1, but there is no nvcc in CUDA_HOME or on PATH")
        return "there is no nvcc in CUDA_HOME or on PATH"
    if wanted != "1" and torch.version.cuda is None:
        return "torch here is built without CUDA (FASTATTN_CUDA=1 builds them nevertheless)"
    return None


def builder(torch, cpp_extension):
    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self):
            compiler = cpp_extension.get_cxx_compiler()
            if shutil.which(shlex.split(compiler)[0]) is None:
                sys.exit(
                    f"setup.py: fastattn needs a C++17 compiler and found no {compiler}: install "
                    "g++ (Debian, Ubuntu: apt install g++) or set CXX"
                )
            super().build_extensions()

        def build_extension(self, ext):
            if ext.name != "fastattn._cuda":
                super().build_extension(ext)
                return
            library = Path(self.get_ext_fullpath(ext.name)).resolve()
            nvcc.build(library, *nvcc.torch_flags(torch, cpp_extension))

    return BuildExtension


def main():
    if int(setuptools.__version__.split(".")[0]) < 77:  # no earlier one can read pyproject.toml
        sys.exit(
            f"setup.py: setuptools {setuptools.__version__} is too old, fastattn needs 77: "
            "pip install --upgrade setuptools"
        )
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("setup.py: torch is not importable here, building fastattn without its kernels")
        setup()
        return
    extensions = [c_extension(cpp_extension)]
    if (reason := why_no_cuda(torch)) is not None:
        print(f"setup.py: building fastattn without its CUDA kernels: {reason}")
    else:
        depends = [str(file.relative_to(ROOT)) for file in sorted(nvcc.HERE.glob("*.cu*"))]
        extensions.append(Extension("fastattn._cuda", [], depends=depends, py_limited_api=True))
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": builder(torch, cpp_extension)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
