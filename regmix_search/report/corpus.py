"""What the report says of the text: whether the search collected it, and what the target's two halves share."""

from typing import Any

from regmix_search.report.evidence import Evidence

MANIFEST = "corpus/MANIFEST.json"


def missing_files(evidence: Evidence) -> dict[str, str]:
    """The files that are missed; not the corpus's where text or shards are the user's, or runs came as tables."""
    shards, corpus = (evidence.config.get(part) or {} for part in ("shards", "corpus"))
    tables = "trials.jsonl" in evidence.missing and "losses.csv" not in evidence.missing
    brought = shards.get("data_dir") or corpus.get("kind") == "none" or tables
    return {name: why for name, why in evidence.missing.items() if not (brought and name == MANIFEST)}


def shared_files(evidence: Evidence, target: str) -> str:
    """A warning when the half that judges has pieces of files that the half that the search scored has too."""
    halves: dict[str, set[tuple[Any, Any]]] = {"valid": set(), "test": set()}
    for entry in evidence.manifest.get("files") or []:
        if entry.get("domain") == target and entry.get("split") in halves:
            halves[entry["split"]].add((entry.get("package"), entry.get("path")))
    both = halves["valid"] & halves["test"]
    if not both:
        return ""
    return (
        f"Both halves of {target} hold pieces of the same files ({len(both)} of the {len(halves['test'])} files that "
        "judge; no piece is in both): the verdict is on more of this text, not on text from elsewhere."
    )
