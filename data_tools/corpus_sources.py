"""Which files of which installed packages may become text: an allow-list, RECORD, sha256, nothing else.

A folder is never walked. A file counts only if its distribution is named in ALLOWED_DISTS, its RECORD lists it with a
sha256, it is a regular file inside the distribution's own folder, and its bytes have that sha256. So a user's own
files can never enter, and two machines with the same wheels see the same text.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

# The run-time closure of the project's own requirements. Left out on purpose: triton and nvidia-* (only on CUDA boxes),
# deepspeed (built on the spot), pip and setuptools (they come with the interpreter, at any version), tzdata (no text).
_ALLOWED = """
    absl-py annotated-doc annotated-types anyio click cloudpickle contourpy cycler filelock fonttools fsspec grpcio
    h11 hf-xet httpcore2 httpx2 huggingface-hub idna iniconfig jinja2 joblib kiwisolver lightgbm markdown
    markdown-it-py markupsafe matplotlib mdurl mpmath narwhals networkx numpy orjson packaging pandas pillow pluggy
    protobuf pyarrow pydantic pydantic-core pygments pyparsing pytest python-dateutil pyyaml regex rich safetensors
    scikit-learn scipy sentencepiece shellingham sympy tensorboard threadpoolctl tokenizers torch tqdm transformers
    truststore typer typing-extensions typing-inspection werkzeug zstandard
"""
ALLOWED_DISTS = tuple(_ALLOWED.split())

# Files that differ between wheels of one version (measured on numpy, scipy, scikit-learn: platform, CPython, BLAS) and
# bulk that is written by a generator: transformers' per-model copies, torch's per-operator headers, Cython output.
SKIP_PATHS = re.compile(
    r"(^|/)(__config__|_config[^/]*|version|_version)\.py$|^numpy/distutils/|^scipy/linalg/cython_(blas|lapack)"
    r"|_subroutines\.h$|_numpyconfig\.h$|^transformers/models/|^torch/include/ATen/ops/|^pygments/lexers/_"
    r"|(^|/)(_?vendor(ed)?|\.[^./][^/]*)/|(^|/)([^/]*licen[cs]es?|notice|copying|cmakelists|requirements[^/]*)(\.[^/]*)?($|/)",
    re.IGNORECASE,
)
MAX_FILE_BYTES = 2_000_000  # larger files are generated (bezierTools.c, RedispatchFunctions.h), not written

_KIND_BY_SUFFIX = {
    **dict.fromkeys((".pyi", ".pyx", ".pxd", ".pxi"), "typed"),
    **dict.fromkeys((".h", ".hpp", ".cuh", ".cu", ".c", ".cc", ".cpp", ".inc"), "cpp"),
    **dict.fromkeys((".csv", ".tsv", ".txt", ".dat", ".data", ".afm", ".arff", ".json"), "tables"),
    **dict.fromkeys((".md", ".rst"), "readme"),
}
_TEST_FOLDERS = {"tests", "test", "testing"}


@dataclass(frozen=True)
class Source:
    """One file of one distribution, as its RECORD names it."""

    package: str
    version: str
    path: str  # as in RECORD, relative to root
    sha256: str  # hex
    size: int  # bytes, 0 if RECORD does not say
    kind: str  # python | tests | typed | cpp | tables | readme
    root: str  # the folder that holds the distribution

    @property
    def key(self) -> str:
        """The path without the version in `name-1.2.dist-info`: what the split hashes, so an upgrade moves nothing."""
        return re.sub(r"^([^/]+?)-[^/]*\.dist-info/", r"\1.dist-info/", self.path)

    @property
    def order(self) -> int:
        """A 64-bit hash of `key`: decides the split and every order, never the position in a list."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big")

    @property
    def position(self) -> float:
        """`order` scaled to [0, 1)."""
        return self.order / 2.0**64


@dataclass(frozen=True)
class Skipped:
    """A file or a whole distribution (path "") that was not read, and why."""

    package: str
    path: str
    reason: str


def file_kind(path: str) -> str | None:
    """What kind of text a RECORD path holds, or None if the corpus does not use it."""
    pure = PurePosixPath(path)
    if SKIP_PATHS.search(path):
        return None
    if pure.parts[0].endswith(".dist-info"):
        return "readme" if pure.name == "METADATA" else None
    if pure.suffix.lower() == ".py":
        is_test = bool(_TEST_FOLDERS & set(pure.parts[:-1])) or pure.name.startswith(("test_", "conftest"))
        return "tests" if is_test else "python"
    return _KIND_BY_SUFFIX.get(pure.suffix.lower())


def canonical_name(name: str) -> str:
    """The name of a distribution as PEP 503 writes it: lower case, single dashes."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_distributions(names: list[str]) -> tuple[list[Distribution], list[Skipped]]:
    """The installed ones of `names`, sorted by name; the others are named in the second list.

    A name outside ALLOWED_DISTS is a ValueError.
    """
    found, skipped = [], []
    for name in sorted({canonical_name(name) for name in names}):
        if name not in ALLOWED_DISTS:
            raise ValueError(f"dists: {name!r} is not on the allow-list; choose among: {', '.join(ALLOWED_DISTS)}")
        try:
            found.append(distribution(name))
        except PackageNotFoundError:
            skipped.append(Skipped(name, "", "not installed"))
    return found, skipped


def list_sources(dist: Distribution) -> tuple[list[Source], list[Skipped]]:
    """Every usable file that the RECORD of `dist` lists with a sha256, sorted by path; nothing is opened yet."""
    meta = dist.metadata  # parsed anew at each look
    name, version = canonical_name(meta["Name"]), meta["Version"]
    if "dir_info" in json.loads(dist.read_text("direct_url.json") or "{}"):
        return [], [Skipped(name, "", "installed from a local folder")]
    record = dist.read_text("RECORD")
    if not record:
        return [], [Skipped(name, "", "no RECORD")]
    root = str(Path(str(dist.locate_file(""))).resolve())
    sources, skipped = [], []
    for path, digest, size in sorted([*row, "", ""][:3] for row in csv.reader(record.splitlines()) if row):
        kind, sha256 = file_kind(path), _hex_sha256(digest)
        size_bytes = int(size) if size.isdigit() else 0
        if kind is None or size_bytes > MAX_FILE_BYTES:
            continue
        if not sha256:
            skipped.append(Skipped(name, path, "no sha256 in RECORD"))
        elif PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            skipped.append(Skipped(name, path, "outside the distribution's folder"))
        else:
            sources.append(Source(name, version, path, sha256, size_bytes, kind, root))
    return sources, skipped


def _hex_sha256(digest: str) -> str:
    """RECORD's `sha256=<urlsafe base64 without padding>` in hex; "" if it is anything else."""
    if not re.fullmatch(r"sha256=[A-Za-z0-9_-]{43}", digest):
        return ""
    return base64.urlsafe_b64decode(digest[7:] + "=").hex()


def read_verified(source: Source) -> bytes | Skipped:
    """The bytes of `source` if they are what RECORD promises, else the reason why not."""
    path = os.path.join(source.root, source.path)
    if not os.path.lexists(path):
        return Skipped(source.package, source.path, "listed in RECORD but missing")
    if os.path.realpath(path) != path:
        return Skipped(source.package, source.path, "a symlink, or behind one")
    if not os.path.isfile(path):
        return Skipped(source.package, source.path, "not a regular file")
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if hashlib.sha256(data).hexdigest() != source.sha256:
        return Skipped(source.package, source.path, "sha256 differs from RECORD")
    return data


def dist_license(dist: Distribution) -> str:
    """The licence that the METADATA of `dist` declares, on one line."""
    meta = dist.metadata
    fields = meta.get_all("License-Expression") or meta.get_all("License") or [""]
    declared: str = fields[0].strip().partition("\n")[0]
    classifiers = [c.split(" :: ")[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    if not declared or len(declared) > 80 or "copyright" in declared.lower() or declared.startswith("==="):
        declared = ", ".join(classifiers) or "see its METADATA"
    return declared
