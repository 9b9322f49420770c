"""Build script; all metadata is in pyproject.toml.

`python setup.py build_ext --inplace` builds the CPU kernels with the torch that is installed. Where torch or a compiler is
missing the package still installs, says so, and runs on the reference backend.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("fqt/cpu/csrc").glob("*/*.cpp"))
HEADERS = sorted(str(path) for path in Path("fqt/cpu/csrc").glob("*/*.h"))


def extension() -> dict:
    """The keywords of `setup` that build the extension, or none where it cannot be built."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("fqt: torch is not installed here, so the CPU kernels are not built", file=sys.stderr)
        return {}
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        print("fqt: no C++ compiler found (apt-get install g++), so the CPU kernels are not built", file=sys.stderr)
        return {}
    # the stable ABI as of torch 2.11; floats must round as the reference's: no fused multiply-add
    flags = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    flags.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
    # optional: a compiler that fails costs the kernels, not the installation
    kernels = CppExtension("fqt._cpu", SOURCES, depends=HEADERS, extra_compile_args=flags, py_limited_api=True, optional=True)
    build = BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=False)
    return {"ext_modules": [kernels], "cmdclass": {"build_ext": build}}


setup(**extension())
