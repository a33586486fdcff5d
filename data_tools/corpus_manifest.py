"""The corpus on disk: JSON lines, MANIFEST.json, SOURCES.md, and the comparison with the repository's reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.corpus_filter import Document
from data_tools.corpus_sources import Skipped, Source
from megatron_lite.files import atomic_write

FORMAT = 1  # raise it when the extraction changes: a finished folder of another format is built anew
REFERENCE = Path(__file__).with_name("corpus_reference.json")
_SOURCES_HEAD = """# Where this text comes from

Every line was read from packages that are installed on this machine, for training on this machine. Nothing was
downloaded for it, and nothing of it is meant to be passed on. A model trained on it is derived from these packages:
look at their licences before you publish one. `MANIFEST.json` names each file, its sha256 and what became of it.

| package | version | licence (as declared) | documents | kB |
|---|---|---|--:|--:|
"""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def output_name(domain: str, split: str) -> str:
    """The file of one split of one domain."""
    return f"valid_{domain}_test.jsonl" if split == "test" else f"{split}_{domain}.jsonl"


def finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest in `out` if it was made with these settings and its files are all there, else None."""
    try:
        manifest = json.loads((out / "MANIFEST.json").read_text())
        if manifest["format"] != FORMAT or manifest["settings"] != settings:
            return None
        if any((out / name).stat().st_size != about["file_bytes"] for name, about in manifest["outputs"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(manifest)


def dist_fingerprints(sources: Iterable[Source], skipped: Iterable[Skipped]) -> dict[str, str]:
    """name==version -> 16 hex digits over the paths and sha256 of its files, METADATA and unread files left out.

    METADATA names the wheel's variant and its requirements, which is not what the corpus is made of.
    """
    bad = {(s.package, s.path) for s in skipped}
    lines: dict[str, list[str]] = {}
    for s in sources:
        some = lines.setdefault(f"{s.package}=={s.version}", [])
        if s.kind != "readme" and (s.package, s.path) not in bad:
            some.append(f"{s.path} {s.sha256}\n")
    return {name: _sha256("".join(sorted(some)).encode())[:16] for name, some in sorted(lines.items())}


def write_documents(
    path: Path, documents: Sequence[Document], sources: Sequence[Source]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write one .jsonl file; returns what the manifest says of it, and of each document in it."""
    lines, entries = [], []
    for document in documents:
        source = sources[document.source]
        line = {"text": document.text, "source": f"{source.package}-{source.version}:{source.path}"}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        entry: dict[str, Any] = {"package": source.package, "version": source.version, "path": source.path}
        entry |= {"sha256": source.sha256, "domain": document.domain, "split": document.split}
        entries.append(entry | {"bytes": len(document.text.encode())})
    data = "".join(lines).encode()
    atomic_write(path, data)
    about = {"documents": len(lines), "bytes": sum(entry["bytes"] for entry in entries)}
    return about | {"file_bytes": len(data), "sha256": _sha256(data)}, entries


def write_corpus(
    out: Path,
    settings: Mapping[str, Any],
    sources: Sequence[Source],
    kept: Mapping[str, Sequence[Document]],
    skipped: Sequence[Skipped],
    removed: Mapping[str, Any],
    licenses: Mapping[str, str],
) -> dict[str, Any]:
    """Write everything, MANIFEST.json last, and return the manifest. The files of an earlier corpus go."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "MANIFEST.json").unlink(missing_ok=True)
    outputs: dict[str, dict[str, Any]] = {}
    files: list[dict[str, Any]] = []
    for domain, documents in kept.items():
        for split in ("train", "valid", "test"):
            name = output_name(domain, split)
            some = [document for document in documents if document.split == split]
            if not some:
                (out / name).unlink(missing_ok=True)
                continue
            about, entries = write_documents(out / name, some, sources)
            outputs[name] = {"domain": domain, "split": split} | about
            files += entries
    manifest = {
        "format": FORMAT,
        "fingerprint": _sha256("".join(f"{n} {outputs[n]['sha256']}\n" for n in sorted(outputs)).encode()),
        "settings": dict(settings),
        "dist_fingerprints": dist_fingerprints(sources, skipped),
        "outputs": outputs,
        "removed": dict(removed),
        "skipped": [asdict(s) for s in skipped],
    }
    atomic_write(out / "SOURCES.md", sources_page(files, licenses))
    atomic_write(out / "MANIFEST.json", _dump(manifest | {"files": files}))
    return manifest | {"files": files}


def _dump(manifest: Mapping[str, Any]) -> bytes:
    """JSON with one line for each file: it can be read and compared by eye, and stays small."""
    head = json.dumps({k: v for k, v in manifest.items() if k != "files"}, indent=1)
    files = ",\n".join(json.dumps(entry) for entry in manifest["files"])
    return f'{head[:-2]},\n "files": [\n{files}\n]\n}}\n'.encode()


def sources_page(files: Iterable[Mapping[str, Any]], licenses: Mapping[str, str]) -> str:
    """SOURCES.md: what came from which package under which licence."""
    rows: dict[str, list[Any]] = {}
    for entry in files:
        row = rows.setdefault(entry["package"], [entry["version"], 0, 0])
        row[1] += 1
        row[2] += entry["bytes"]
    table = [
        f"| {name} | {version} | {licenses[name].replace('|', '/')} | {count:,} | {size / 1e3:,.0f} |\n"
        for name, (version, count, size) in sorted(rows.items())
    ]
    return _SOURCES_HEAD + "".join(table)


def summary_table(manifest: Mapping[str, Any], bytes_per_token: Mapping[str, float]) -> str:
    """A plain-text table, one row a file: documents, MB, estimated tokens; below it what was not read."""
    lines = [f"{'file':<28}{'documents':>10}{'MB':>9}{'est. tokens':>13}"]
    for name, about in manifest["outputs"].items():
        tokens = about["bytes"] / bytes_per_token[about["domain"]]
        lines.append(f"{name:<28}{about['documents']:>10,}{about['bytes'] / 1e6:>9.2f}{tokens / 1e6:>12.2f}M")
    skipped = manifest["skipped"]
    empty = [d for d in manifest["settings"]["max_bytes"] if f"train_{d}.jsonl" not in manifest["outputs"]]
    lines += [f"no text for: {', '.join(empty)}"] if empty else []
    lines += [f"not read: {s['package']} {s['path']}: {s['reason']}".replace(" :", ":") for s in skipped[:20]]
    if len(skipped) > 20:
        lines.append(f"not read: {len(skipped) - 20} more, see MANIFEST.json")
    return "\n".join(lines)


def write_reference(manifest: Mapping[str, Any], path: Path = REFERENCE) -> None:
    """Store what `compare_with_reference` compares with: settings, fingerprint, one short hash a package."""
    settings = {k: v for k, v in manifest["settings"].items() if k != "dists"}
    reference = {"settings": settings, "fingerprint": manifest["fingerprint"], "dists": manifest["dist_fingerprints"]}
    atomic_write(path, json.dumps(reference, indent=1) + "\n")


def compare_with_reference(manifest: Mapping[str, Any], path: Path = REFERENCE) -> str:
    """One line: whether packages and text are those of the reference, or which packages differ and how.

    A corpus of some packages only, or with other caps, is compared package by package.
    """
    if not path.exists():
        return f"corpus has no reference to compare with ({path.name})"
    reference = json.loads(path.read_text())
    here, there = manifest["dist_fingerprints"], reference["dists"]
    versions = dict(spec.split("==") for spec in there)
    differ = []
    for spec, digest in here.items():
        name, version = spec.split("==")
        if name not in versions:
            differ.append(f"{name} (not in the reference)")
        elif versions[name] != version:
            differ.append(f"{name} ({version}, reference {versions[name]})")
        elif there[spec] != digest:
            differ.append(f"{name} (other files)")
    missing = {s["package"] for s in manifest["skipped"] if not s["path"]}
    differ += [f"{name} (not read)" for name in sorted(missing & versions.keys())]
    if differ:
        return f"corpus differs from the reference in {len(differ)} packages: {', '.join(differ)}"
    same_settings = reference["settings"] == {k: v for k, v in manifest["settings"].items() if k != "dists"}
    if not same_settings or len(here) != len(there):
        return "corpus: the packages match the reference; the selection is another"
    if manifest["fingerprint"] != reference["fingerprint"]:
        return "corpus differs from the reference: the same files gave other text (another Python or extractor)"
    return "corpus matches the reference"
