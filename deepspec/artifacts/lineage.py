"""The chain behind an artifact, back to its data set, read from the store alone."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactInfo, ArtifactInput, ArtifactKey, Manifest
from deepspec.artifacts.run import open_run
from deepspec.artifacts.stages import BENCHMARKS
from deepspec.errors import ArtifactMismatch
from deepspec.storage.store import Store
from deepspec.storage.urls import open_store


def find_artifact(
    source: str, overrides: Sequence[str] = (), *, store: str | None = None
) -> Artifact:
    """The artifact of a folder or URL, or the result of a run, whether or not it is there."""
    return artifact_at(source) or open_run(source, overrides, store=store).artifact("evaluate")


def artifact_at(source: str) -> Artifact | None:
    """The artifact of a folder or URL, or None where `source` names a run."""
    if (Path(source) / "artifact.json").is_file():
        # a folder named without its parents is not taken for a recipe
        source = str(Path(source).resolve())
    if source.endswith((".yaml", ".yml")) or "/" not in source:
        return None
    source = source if "://" in source else str(Path(source).absolute())
    root, _, folder = source.rstrip("/").rpartition("/")[0].rpartition("/")
    name, _, fingerprint = source.rstrip("/").rpartition("/")[2].rpartition("-")
    return Artifact(open_store(root), ArtifactKey(folder, name, fingerprint, {}, ()))


def require_info(artifact: Artifact) -> ArtifactInfo:
    """The content of `artifact.json`.

    Raises:
        ArtifactMismatch: there is no artifact.
    """
    info = artifact.info()
    if info is None:
        fix = "give the folder that holds artifact.json, or run it first"
        raise ArtifactMismatch("there is no artifact here", where=artifact.url, fix=fix)
    return info


def input_artifact(store: Store, entry: ArtifactInput) -> Artifact:
    """The artifact that another one names as its input."""
    return Artifact(store, ArtifactKey(entry.stage, entry.name, entry.fingerprint, {}, ()))


def chain(store: Store, info: ArtifactInfo) -> Iterator[tuple[int, ArtifactInfo]]:
    """An artifact and everything it was made from, each with its depth, from the store alone."""
    yield 0, info
    for entry in info.inputs:
        upstream = input_artifact(store, entry).info()
        if upstream is not None:
            yield from ((depth + 1, found) for depth, found in chain(store, upstream))


def lineage_lines(
    source: str, overrides: Sequence[str] = (), *, store: str | None = None
) -> Iterator[str]:
    """The chain behind an artifact (or behind the result of a run), read from the store.

    One line per artifact, indented by its depth.

    Raises:
        ArtifactMismatch: there is no artifact.
    """
    artifact = find_artifact(source, overrides, store=store)
    unsealed = "not finished"
    for depth, info in chain(artifact.store, require_info(artifact)):
        manifest = input_artifact(artifact.store, info).manifest()
        seal = unsealed
        if manifest is not None:
            rows, tokens = manifest.totals["rows"], manifest.totals["tokens"]
            seal = f"digest {manifest.digest}, {rows} rows, {tokens} tokens"
            if info.stage == "train" and not was_trained_on_cache(manifest):
                unsealed = "made in training"
        folder = f"{info.stage}/{info.name}-{info.fingerprint}"
        yield f"{'  ' * depth}{folder}  ({seal}{_origin(artifact.store, info)})"


def was_trained_on_cache(manifest: Manifest) -> bool:
    """Whether the draft of this manifest was trained on a sealed cache of hidden states.

    Otherwise its inputs are those that its hidden states were made from.
    """
    return any(name.startswith("hidden/") for name in manifest.inputs)


def _origin(store: Store, info: ArtifactInfo) -> str:
    """The data set and the commit that an artifact was read from; empty for any other."""
    of_prompts = info.recipe.get("prompts", {}).get("source", {})
    source = info.recipe if info.stage == BENCHMARKS else of_prompts
    name = source.get("dataset") or source.get("name")
    if not name:
        return ""
    revision = source.get("revision")
    if not revision:
        with suppress(FileNotFoundError):  # a local folder has no commit
            path = f"{info.stage}/{info.name}-{info.fingerprint}/source.json"
            revision = json.loads(store.read(path))["revision"]
    return f", data set {name}{f' at {revision}' if revision else ''}"
