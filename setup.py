"""Packages and the native extension; everything else is in pyproject.toml.

``fastguide.kernels`` lives in the top-level folder ``kernels/``. The extension ``fastguide._C`` is
optional: where it cannot be built, the PyTorch definition of its ops is used. Set
``FASTGUIDE_REQUIRE_NATIVE=1`` to make a failed build an error.
"""

import os
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import BaseError, CCompilerError

REQUIRE_NATIVE = os.environ.get("FASTGUIDE_REQUIRE_NATIVE", "") not in ("", "0")

PLAIN_PROBE = "int main() { return 0; }"
OPENMP_PROBE = """
#include <omp.h>
int main() { return omp_get_max_threads() > 0 ? 0 : 1; }
"""
CLONES_PROBE = """
#include <cstdlib>
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
int twice(int x) { return 2 * x; }
int main(int argc, char**) { return twice(argc) > 0 ? 0 : 1; }
"""


class BuildNative(build_ext):
    """Adds the compile options that this compiler has."""

    def build_extensions(self) -> None:
        """Probe the compiler, then build."""
        msvc = self.compiler.compiler_type == "msvc"
        for extension in self.extensions:
            compile_args = ["/O2"] if msvc else ["-O3", "-fno-math-errno", "-fno-trapping-math"]
            link_args = []
            if msvc:
                compile_args += ["/openmp"]
            elif self.works(OPENMP_PROBE, ["-fopenmp"]):
                compile_args += ["-fopenmp"]
                link_args += ["-fopenmp"]
            elif self.works(PLAIN_PROBE, ["-fopenmp-simd"]):
                compile_args += ["-fopenmp-simd"]
            if not msvc and self.works(CLONES_PROBE, []):
                compile_args += ["-DFASTGUIDE_TARGET_CLONES"]
            extension.extra_compile_args += compile_args
            extension.extra_link_args += link_args
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
