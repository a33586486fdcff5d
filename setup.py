"""Packaging. The C++ behind the data loader is optional: without a compiler the same code runs in numpy, slower."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_lite/__init__.py").read_text()).group(1)

REQUIRES = [
    "torch>=2.10",
    "numpy",
    "scipy",
    "pandas",
    "lightgbm",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "pyyaml",
    "rich",
    "matplotlib",
    "tensorboard",
    "zstandard",
    "orjson",
    "jinja2",
    "xxhash",
    "scikit-learn",
]
EXTRAS = {
    "deepspeed": ["deepspeed"],
    "hf": ["transformers"],
    "parquet": ["pyarrow"],
    "fast": ["gigatoken"],  # tokenising 40 to 100 times faster, with the same ids or not at all
    "tiktoken": ["tiktoken"],
    "flash": ["flash-attn"],
    "ray": ["ray"],  # proxies.executor=ray
    "eval": ["lm_eval[hf]"],
    "bench": ["megatron-core", "transformers", "litgpt", "gigatoken"],
    "dev": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "types-PyYAML",
        "pandas-stubs",
        "pre-commit",
        "transformers",
        "pyarrow",
        "gigatoken",
        "tiktoken",
    ],
}
EXTRAS["all"] = sorted({requirement for group in EXTRAS.values() for requirement in group})


class OptionalBuildExt(build_ext):
    """Build the shared library if a compiler is there; if not, say so once and go on."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # no compiler, no headers, a read-only folder: none of it may stop an install
            first_line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            self.warn(f"the C++ data kernels were not built, numpy does their work, slower ({first_line})")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Ours are plain C functions found by ctypes; there is no PyInit to export."""
        return ext.export_symbols


NATIVE = Extension(
    "megatron_lite.data._native",
    sources=sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("megatron_lite/data/csrc/*.cpp")),
    depends=sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("megatron_lite/data/csrc/*.h")),
    language="c++",
    # No contraction: a fused multiply-add would round differently from numpy, and the sample order would change.
    extra_compile_args=["-O3", "-std=c++17", "-ffp-contract=off", "-g0"],
    optional=True,  # setuptools: do not look for the file when the build failed
)

setup(
    name="megatron_lite",
    version=VERSION,
    description="Train language models on data mixtures that were searched for: RegMix on a small Megatron",
    packages=find_packages(include=["megatron_lite*", "data_tools*", "regmix_search*", "launch*"]),
    package_data={
        "megatron_lite.data": ["csrc/*.cpp", "csrc/*.h"],
        "regmix_search.report": ["*.j2", "*.css"],
        "data_tools": ["*.json"],
    },
    ext_modules=[NATIVE],
    cmdclass={"build_ext": OptionalBuildExt},
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
