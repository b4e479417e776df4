"""The chain behind an artifact, back to its data set, and the run that made it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactInfo, ArtifactInput, ArtifactKey, Manifest
from deepspec.artifacts.run import Run, open_run
from deepspec.artifacts.stages import BENCHMARKS
from deepspec.config.old_keys import translated
from deepspec.config.recipes import load_run, validated
from deepspec.config.resources import ResourcesConfig
from deepspec.config.run import RunConfig
from deepspec.errors import ArtifactMismatch, ConfigError, DataError
from deepspec.storage.store import Store
from deepspec.storage.urls import open_store


def find_artifact(source: str, overrides: Sequence[str], *, store: str | None) -> Artifact:
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
    *root, stage, folder = source.rstrip("/").split("/")
    name, _, fingerprint = folder.rpartition("-")
    return Artifact(open_store("/".join(root)), ArtifactKey(stage, name, fingerprint, {}, ()))


def require_info(artifact: Artifact) -> ArtifactInfo:
    """The content of `artifact.json`.

    Raises:
        ArtifactMismatch: there is no artifact.
    """
    info = artifact.info()
    if info is None:
        raise ArtifactMismatch(
            "there is no artifact here",
            where=artifact.url,
            fix="give the folder that holds artifact.json, or run it first",
        )
    return info


def input_artifact(store: Store, entry: ArtifactInput) -> Artifact:
    """The artifact that another one names as its input."""
    return Artifact(store, ArtifactKey(entry.stage, entry.name, entry.fingerprint, {}, ()))


def chain(artifact: Artifact, depth: int = 0) -> Iterator[tuple[int, Artifact, ArtifactInfo]]:
    """An artifact and everything it was made from, each with its depth, from the store alone."""
    if info := artifact.info():
        yield depth, artifact, info
        for entry in info.inputs:
            yield from chain(input_artifact(artifact.store, entry), depth + 1)


def lineage_lines(artifact: Artifact) -> Iterator[str]:
    """The chain behind an artifact, read from the store.

    One line per artifact, indented by its depth.

    Raises:
        ArtifactMismatch: there is no artifact.
    """
    unsealed = "not finished"
    require_info(artifact)
    for depth, made, info in chain(artifact):
        manifest, seal = made.manifest(), unsealed
        if manifest is not None:
            rows, tokens = manifest.totals["rows"], manifest.totals["tokens"]
            seal = f"digest {manifest.digest}, {rows} rows, {tokens} tokens"
            if info.stage == "train" and not was_trained_on_cache(manifest):
                unsealed = "made in training"
        yield f"{'  ' * depth}{made.folder}  ({seal}{_origin(made, info)})"


def was_trained_on_cache(manifest: Manifest) -> bool:
    """Whether the draft of this manifest was trained on a sealed cache of hidden states.

    Otherwise its inputs are those that its hidden states were made from.
    """
    return any(name.startswith("hidden/") for name in manifest.inputs)


def find_run(source: str, overrides: Sequence[str] = (), *, store: str | None = None) -> RunConfig:
    """The run that a recipe or a run file describes, or that made the artifact of a folder or URL.

    That run's store is the one in which the artifact lies now, wherever it was made.

    Raises:
        ConfigError: unknown recipe, key or value, or an artifact whose run this version does not
            know.
        ArtifactMismatch: there is no artifact, or it does not record which run made it.
    """
    artifact = artifact_at(source)
    if artifact is None:
        return load_run(source, overrides, store=store)
    info = require_info(artifact)
    where = f"{artifact.url}/artifact.json"
    if not info.run:
        raise ArtifactMismatch(
            "the artifact does not record which run made it",
            where=where,
            fix="give the run's recipe or file",
        )
    if store is None:
        is_local = artifact.store.is_local
        store = str(Path(artifact.store.root).resolve()) if is_local else artifact.store.url
    resources = translated(info.run.get("resources", {}), ResourcesConfig)
    fix = f"print it with deepspec {info.code_version}, or correct a copy of `run` in that file"
    return validated(
        {**info.run, "resources": resources, "store": store}, overrides, where=where, fix=fix
    )


def drift(source: str, config: RunConfig) -> str:
    """Why the run that made this artifact would not find it again.

    Empty where it would, and where `source` names a run.
    """
    artifact = artifact_at(source)
    if artifact is None:
        return ""
    try:
        found = Run(config).artifact(artifact.key.stage).key.fingerprint
    except (DataError, ConfigError) as error:
        note = "relative paths are those of the run's folder"
        return f"a file that the run reads is not here ({note}): {error}"
    made = artifact.key.fingerprint
    if found == made:
        return ""
    return f"this run makes {found}, not {made}: a file that it reads, or the format, has changed"


def sealed_inputs(artifact: Artifact) -> Iterator[Artifact]:
    """The sealed artifacts that this one was made from.

    In place of one that is not sealed (hidden states made in training), those it was made from.
    """
    info = artifact.info()
    for entry in info.inputs if info else ():
        upstream = input_artifact(artifact.store, entry)
        if upstream.manifest() is not None:
            yield upstream
        else:
            yield from sealed_inputs(upstream)


def _origin(artifact: Artifact, info: ArtifactInfo) -> str:
    """The data set and the commit that an artifact was read from; empty for any other."""
    of_prompts = info.recipe.get("prompts", {}).get("source", {})
    source = info.recipe if info.stage == BENCHMARKS else of_prompts
    name = source.get("dataset") or source.get("name")
    if not name:
        return ""
    revision = source.get("revision")
    if not revision:
        with suppress(FileNotFoundError):  # a local folder has no commit
            revision = json.loads(artifact.read("source.json"))["revision"]
    return f", data set {name}{f' at {revision}' if revision else ''}"
