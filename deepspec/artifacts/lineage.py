"""Fingerprints: an artifact is named by everything that decides its content, and by nothing else.

The chain of fingerprints is the lineage: a result names its draft, the draft its hidden states,
they their answers, and those their prompts. Resources (lanes, batch sizes, endpoints) are in no
fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import xxhash

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactInfo, ArtifactInput, ArtifactKey
from deepspec.config.benchmarks import DEMO, BenchmarkSet, find_benchmark
from deepspec.config.data import DatasetSource, DemoSource, FileSource
from deepspec.config.recipes import load_run, section_of
from deepspec.config.run import RunConfig
from deepspec.errors import ArtifactMismatch, DataError
from deepspec.storage.store import Store, canonical_json, file_checksum
from deepspec.storage.urls import open_store

STAGES = ("demo", "prompts", "answers", "hidden", "train", "evaluate")
FORMAT_VERSION = {
    "demo": 1,
    "prompts": 2,
    "answers": 2,
    "hidden": 1,
    "train": 1,
    "evaluate": 1,
    "benchmarks": 1,
}
SAMPLED_BLOCK = 1 << 20


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """The run's stages in the order they are run; what a user brings is read before a minute
    goes into the demo's target.
    """
    if config.demo is None:
        return STAGES[1:]
    return STAGES if config.prompts.source.kind == "demo" else ("prompts", "demo", *STAGES[2:])


def artifact_of(config: RunConfig, stage: str) -> Artifact:
    return Artifact(store_of(config), artifact_key(config, stage))


def store_of(config: RunConfig) -> Store:
    """The run's store, used as its resources say."""
    return open_store(
        config.store,
        scratch=config.resources.storage.scratch,
        uploads=config.resources.checks.uploads,
    )


def artifact_key(config: RunConfig, stage: str) -> ArtifactKey:
    """The key of the artifact that this run's `stage` reads or makes.

    Raises:
        DataError: a prompts or benchmark file that does not exist.
    """
    upstream = [artifact_key(config, name) for name in upstream_of(config, stage)]
    inputs = [
        key.as_input() for key in (*upstream, *map(benchmark_key, known_benchmarks(config, stage)))
    ]
    return _key(stage, _name(config, stage), _recipe(config, stage), inputs)


def benchmark_key(benchmark: BenchmarkSet) -> ArtifactKey:
    """The key of a known benchmark's prompts: of every run that reads them, whatever its target."""
    return _key("benchmarks", benchmark.name, benchmark.recipe(), ())


def known_benchmarks(config: RunConfig, stage: str) -> list[BenchmarkSet]:
    """The known benchmarks that this stage reads; files and the demo's own are none."""
    names = {
        "prompts": config.prompts.decontaminate,
        "evaluate": [entry.name for entry in config.evaluate.benchmarks],
    }.get(stage, ())
    return [known for name in dict.fromkeys(names) if (known := find_benchmark(name))]


def _key(
    stage: str, name: str, recipe: dict[str, Any], inputs: Sequence[ArtifactInput]
) -> ArtifactKey:
    content = {
        "stage": stage,
        "format": FORMAT_VERSION[stage],
        "recipe": recipe,
        "inputs": [entry.fingerprint for entry in inputs],
    }
    fingerprint = hashlib.sha256(canonical_json(content)).hexdigest()[:12]
    return ArtifactKey(stage, name, fingerprint, recipe, tuple(inputs), FORMAT_VERSION[stage])


def upstream_of(config: RunConfig, stage: str) -> tuple[str, ...]:
    """The stages whose artifacts this stage reads; the first one gives it its shard numbers."""
    uses_demo = {
        "prompts": config.prompts.source.kind == "demo",
        "answers": config.demo is not None,
        "hidden": config.demo is not None,
        "evaluate": config.demo is not None,
    }
    before = {
        "answers": "prompts",
        "hidden": "answers",
        "train": "hidden",
        "evaluate": "train",
    }.get(stage)
    return tuple(name for name in (before, "demo" if uses_demo.get(stage) else None) if name)


def chain(store: Store, info: ArtifactInfo) -> Iterator[tuple[int, ArtifactInfo]]:
    """An artifact and everything it was made from, each with its depth, read from the store
    alone.
    """
    yield 0, info
    for entry in info.inputs:
        upstream = input_artifact(store, entry).info()
        if upstream is not None:
            yield from ((depth + 1, found) for depth, found in chain(store, upstream))


def input_artifact(store: Store, entry: ArtifactInput) -> Artifact:
    return Artifact(store, ArtifactKey(entry.stage, entry.name, entry.fingerprint, {}, ()))


def find_artifact(
    source: str, overrides: Sequence[str] = (), *, store: str | None = None
) -> Artifact:
    """The artifact of a folder or URL, or the result of a run (recipe or run file); whether it
    is there is not looked at.
    """
    return artifact_at(source) or artifact_of(load_run(source, overrides, store=store), "evaluate")


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
    """What `artifact.json` says.

    Raises:
        ArtifactMismatch: there is no artifact.
    """
    info = artifact.info()
    if info is None:
        fix = "give the folder that holds artifact.json, or run it first"
        raise ArtifactMismatch("there is no artifact here", where=artifact.url, fix=fix)
    return info


def _recipe(config: RunConfig, stage: str) -> dict[str, Any]:
    target = section_of(config.target)
    spoken = {
        key: target[key] for key in ("model", "revision", "chat_family", "thinking", "dtype")
    } | _local_model(config)
    match stage:
        case "demo":
            return {"demo": section_of(config.demo) if config.demo else None}
        case "prompts":
            return {"prompts": section_of(config.prompts), "files": _source_digests(config)}
        case "answers":
            return {"answers": section_of(config.answers), "target": spoken}
        case "hidden":
            return {
                "hidden": section_of(config.hidden),
                "target": {**spoken, "layer_ids": target["layer_ids"]},
            }
        case "train":
            settings = section_of(config.train)
            # how the ranks share the work: a training may go on with another one
            del settings["strategy"]
            sections = {
                "draft": section_of(config.draft),
                "loss": section_of(config.loss),
                "train": settings,
            }
            return {"mask_token_id": config.target.mask_token_id, **sections}
        case _:
            known = {
                entry.name: [entry.num_prompts, entry.domain]
                for entry in known_benchmarks(config, "evaluate")
            }
            return {
                "evaluate": section_of(config.evaluate),
                "target": spoken,
                "files": _benchmark_digests(config),
                "known": known,
            }


def _name(config: RunConfig, stage: str) -> str:
    """A word for people to recognise the folder by; the same for all runs that share the
    artifact.
    """
    target = _slug(config.target.model)
    match stage, config.prompts.source:
        case "demo", _:
            return "demo"
        case "prompts", DatasetSource(name=name):
            return _slug(name)
        case "prompts", FileSource(paths=paths):
            return _slug(Path(paths[0]).stem)
        case "prompts", DemoSource():
            return "demo"
        case (("train" | "evaluate"), _):
            return f"{config.draft.algorithm}-{target}"
        case _:
            return target


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", Path(text).name.lower()).strip("-.") or "x"


def _local_model(config: RunConfig) -> dict[str, str]:
    """A digest of a local model folder; hub models are named by their revision, the demo's by
    its artifact.
    """
    folder = Path(config.target.model)
    return (
        {"files": _folder_digest(str(folder.resolve()))}
        if config.demo is None and folder.is_dir()
        else {}
    )


@lru_cache
def _folder_digest(folder: str) -> str:
    """Small files whole, large ones by size, first and last megabyte: a 30 GB model must not be
    read to be named.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix not in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BLOCK))
            file.seek(max(0, size - SAMPLED_BLOCK))
            digest.update(file.read(SAMPLED_BLOCK))
    return digest.hexdigest()


def _source_digests(config: RunConfig) -> dict[str, str]:
    source = config.prompts.source
    paths = [
        *(source.paths if isinstance(source, FileSource) else ()),
        *filter(_is_file, config.prompts.decontaminate),
    ]
    return {path: file_digest(path) for path in paths}


def _benchmark_digests(config: RunConfig) -> dict[str, str]:
    return {
        path: file_digest(path)
        for path in (benchmark.name for benchmark in config.evaluate.benchmarks)
        if _is_file(path)
    }


def _is_file(benchmark: str) -> bool:
    return benchmark not in DEMO and find_benchmark(benchmark) is None


@lru_cache
def file_digest(path: str) -> str:
    """What a file holds, as hex: its checksum locally, the server's word (etag and size)
    elsewhere.
    """
    filesystem, location = fsspec.core.url_to_fs(path)
    if not filesystem.exists(location):
        fix = "check the path in prompts.source.paths, prompts.decontaminate or evaluate.benchmarks"
        raise DataError("the file does not exist", where=path, fix=fix)
    if Path(location).is_file():
        return file_checksum(Path(location))
    return str(filesystem.ukey(location))


def _origin(store: Store, info: ArtifactInfo) -> str:
    """The data set and the commit that an artifact was read from, in words; nothing for any
    other.
    """
    source = (
        info.recipe
        if info.stage == "benchmarks"
        else info.recipe.get("prompts", {}).get("source", {})
    )
    name, revision = source.get("dataset") or source.get("name"), source.get("revision")
    if name and not revision:
        with suppress(FileNotFoundError):  # a local folder has no commit
            revision = json.loads(
                store.read(f"{info.stage}/{info.name}-{info.fingerprint}/source.json")
            )["revision"]
    return f", data set {name}{f' at {revision}' if revision else ''}" if name else ""


def describe(
    source: str, overrides: Sequence[str] = (), *, store: str | None = None
) -> Iterator[str]:
    """The chain behind an artifact folder (or behind the result of a run), one line per artifact,
    read from the store.

    Raises:
        ArtifactMismatch: there is no artifact.
    """
    artifact = find_artifact(source, overrides, store=store)
    unsealed = "not finished"
    for depth, found in chain(artifact.store, require_info(artifact)):
        manifest = input_artifact(
            artifact.store, ArtifactInput.model_validate(found.model_dump())
        ).manifest()
        seal = (
            f"digest {manifest.digest}, {manifest.totals['rows']} rows, {manifest.totals['tokens']} tokens"
            if manifest
            else unsealed
        )
        if (
            found.stage == "train"
            and manifest
            and not any(name.startswith("hidden/") for name in manifest.inputs)
        ):
            unsealed = "made in training"
        yield f"{'  ' * depth}{found.stage}/{found.name}-{found.fingerprint}  ({seal}{_origin(artifact.store, found)})"
