"""Packages and the native extension; everything else is in pyproject.toml.

``fastguide.kernels`` lives in the top-level folder ``kernels/``. The extension ``fastguide._C`` is
optional: where it cannot be built, for want of GCC 12 or Clang 18, the PyTorch definition of its
ops is used. ``FASTGUIDE_REQUIRE_NATIVE=1`` makes a failed build an error; with
``FASTGUIDE_SANITIZE=1``, wrong memory accesses and undefined behaviour end the process.
"""

import os
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import BaseError, CCompilerError

REQUIRE_NATIVE = os.environ.get("FASTGUIDE_REQUIRE_NATIVE", "") not in ("", "0")
SANITIZE = os.environ.get("FASTGUIDE_SANITIZE", "") not in ("", "0")

OPENMP_PROBE = """
#include <omp.h>
int main() { return omp_get_max_threads() > 0 ? 0 : 1; }
"""

# Vectors wider than the machine's become several: what that means for calls between files, of
# which psabi warns, does not matter where every function that takes one is inlined.
COMPILE_ARGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class BuildNative(build_ext):
    """Adds the compile options that this compiler has."""

    def build_extensions(self) -> None:
        """Probe the compiler, then build."""
        openmp = ["-fopenmp"] if self.works(OPENMP_PROBE, ["-fopenmp"]) else []
        for extension in self.extensions:
            extension.extra_compile_args += [*COMPILE_ARGS, *openmp]
            extension.extra_link_args += openmp
            if SANITIZE:
                extension.extra_compile_args += ["-O1", "-g", "-fno-omit-frame-pointer"]
                extension.extra_compile_args += SANITIZERS
                extension.extra_link_args += SANITIZERS
        super().build_extensions()

    def works(self, source: str, options: list[str]) -> bool:
        """Whether a small program compiles and links with these options."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.cpp"
            path.write_text(source)
            try:
                objects = self.compiler.compile(
                    [str(path)], output_dir=folder, extra_postargs=["-std=c++17", *options]
                )
                self.compiler.link_executable(
                    objects, "probe", output_dir=folder, extra_postargs=options, target_lang="c++"
                )
            except (BaseError, CCompilerError, OSError):
                return False
        return True


ParallelCompile("FASTGUIDE_BUILD_JOBS", default=0).install()

setup(
    packages=[
        *find_packages(include=["fastguide", "fastguide.*"]),
        "fastguide.kernels",
        *(f"fastguide.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastguide.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "fastguide._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.hpp")),
            cxx_std=17,
            optional=not REQUIRE_NATIVE,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
