"""Build script; all metadata is in pyproject.toml.

`python setup.py build_ext --inplace` builds the CPU kernels with the torch that is installed. Where torch or a compiler is
missing the package still installs, says so, and runs on the reference backend.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("fqt/cpu/csrc").glob("*/*.cpp"))
OBJECTS = "build/extension"
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

    class Build(BuildExtension):
        """With ninja where it is installed: a compiler for each core, and what has not changed is not compiled again."""

        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options, no_python_abi_suffix=True)

        def run(self) -> None:
            if self.editable_mode or self.inplace:
                self.build_temp = OBJECTS  # pip would throw them away
            super().run()

    return {"ext_modules": [kernels], "cmdclass": {"build_ext": Build}}


setup(**extension())
