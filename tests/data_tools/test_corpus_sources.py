"""Who may enter the corpus: only what RECORD lists, unchanged, inside the package's own folder."""

import base64
import hashlib
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

from data_tools.corpus_sources import Skipped, file_kind, find_distributions, list_sources, read_verified
from data_tools.local_corpus import build_corpus, main


def fake_dist(
    root: Path, files: dict[str, str], name: str = "rich", listed: dict[str, str] | None = None
) -> Distribution:
    """An installed package: its RECORD has the hashes of `files`; `listed` overrides lines of it."""
    info = root / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: MIT\n\nLong text.\n")
    rows = []
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        rows.append((listed or {}).get(path, f"{path},sha256={digest},{len(text)}"))
    rows += [line for path, line in (listed or {}).items() if path not in files]
    (info / "RECORD").write_text("\n".join(rows) + "\n")
    return PathDistribution(info)


def test_only_files_that_record_lists_with_their_sha256_are_read(tmp_path: Path) -> None:
    root, secret = tmp_path / "site", tmp_path / "secret.py"
    secret.write_text("password = 1\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(secret.read_bytes()).digest()).decode().rstrip("=")
    dist = fake_dist(
        root,
        {"rich/good.py": "x = 1\n", "rich/changed.py": "x = 2\n", "rich/unhashed.py": "x = 3\n"},
        listed={
            "rich/unhashed.py": "rich/unhashed.py,,",
            "rich/link.py": f"rich/link.py,sha256={digest},13",
            "rich/folder/inside.py": f"rich/folder/inside.py,sha256={digest},13",
            "../secret.py": f"../secret.py,sha256={digest},13",
            "rich/gone.py": f"rich/gone.py,sha256={digest},13",
        },
    )
    (root / "rich/changed.py").write_text("x = 'edited by hand'\n")
    (root / "rich/unlisted.py").write_text("x = 4\n")
    (root / "rich/link.py").symlink_to(secret)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "inside.py").write_text(secret.read_text())
    (root / "rich/folder").symlink_to(outside)

    sources, skipped = list_sources(dist)
    read = {source.path: read_verified(source) for source in sources}
    assert {path for path, data in read.items() if isinstance(data, bytes)} == {"rich/good.py"}
    reasons = {s.path: s.reason for s in [*skipped, *(d for d in read.values() if isinstance(d, Skipped))]}
    assert reasons == {
        "rich/unhashed.py": "no sha256 in RECORD",
        "../secret.py": "outside the distribution's folder",
        "rich/changed.py": "sha256 differs from RECORD",
        "rich/link.py": "a symlink, or behind one",
        "rich/folder/inside.py": "a symlink, or behind one",
        "rich/gone.py": "listed in RECORD but missing",
    }


def test_a_build_names_what_it_did_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(f"def function_number_{i}(argument):\n    return argument + {i}\n" for i in range(20))
    dist = fake_dist(tmp_path / "site", {"rich/good.py": code, "rich/changed.py": code})
    (tmp_path / "site/rich/changed.py").write_text("changed = 1\n")
    monkeypatch.setattr("data_tools.local_corpus.find_distributions", lambda names: ([dist], []))
    manifest = build_corpus(tmp_path / "out", ["rich"], workers=1, log=lambda line: None)
    assert manifest["skipped"] == [
        {"package": "rich", "path": "rich/changed.py", "reason": "sha256 differs from RECORD"}
    ]
    assert {entry["path"] for entry in manifest["files"]} == {"rich/good.py"}
    assert "| rich | 1.0 | MIT |" in (tmp_path / "out/SOURCES.md").read_text()


def test_an_editable_install_is_skipped(tmp_path: Path) -> None:
    dist = fake_dist(tmp_path, {"rich/a.py": "x = 1\n"})
    (tmp_path / "rich-1.0.dist-info/direct_url.json").write_text(
        '{"url": "file:///me", "dir_info": {"editable": true}}'
    )
    assert list_sources(dist) == ([], [Skipped("rich", "", "installed from a local folder")])


def test_a_package_that_is_not_on_the_list_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"'deepspeed' is not on the allow-list.*numpy"):
        find_distributions(["numpy", "deepspeed"])
    assert main(["--out", str(tmp_path), "--dists", "deepspeed"]) == 2
    assert "allow-list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("numpy/linalg/_linalg.py", "python"),
        ("numpy/linalg/tests/util.py", "tests"),
        ("a/test_b.py", "tests"),
        ("numpy/__init__.pyi", "typed"),
        ("torch/include/c10/core/Device.h", "cpp"),
        ("torch/include/ATen/ops/add.h", None),
        ("transformers/models/llama/modeling_llama.py", None),
        ("numpy/__config__.py", None),
        ("numpy/version.py", None),
        ("numpy/_core/include/numpy/_numpyconfig.h", None),
        ("numpy-2.4.6.dist-info/METADATA", "readme"),
        ("numpy-2.4.6.dist-info/RECORD", None),
        ("numpy/random/LICENSE.md", None),
        ("a/.hidden/notes.md", None),
        ("a/data.csv", "tables"),
        ("a/image.png", None),
    ],
)
def test_kind_of_a_path(path: str, kind: str | None) -> None:
    assert file_kind(path) == kind
