"""What an artifact says of where it comes from: the run that made it, and the sealed artifacts
it was made from.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import artifact_at, input_artifact, require_info
from deepspec.artifacts.run import Run
from deepspec.config.old_keys import translated
from deepspec.config.recipes import load_run, validated
from deepspec.config.run import RunConfig
from deepspec.errors import ArtifactMismatch, ConfigError, DataError


def find_run(source: str, overrides: Sequence[str] = (), *, store: str | None = None) -> RunConfig:
    """The run that a recipe or a run file describes, or that made the artifact of a folder or URL.

    That run's store is the one in which the artifact lies now, wherever it was made.

    Raises:
        ConfigError: unknown recipe, key or value, or an artifact whose run this version does not
            know.
        ArtifactMismatch: there is no artifact, or it does not say which run made it.
    """
    artifact = artifact_at(source)
    if artifact is None:
        return load_run(source, overrides, store=store)
    info = require_info(artifact)
    where = f"{artifact.url}/artifact.json"
    if not info.run:
        what = "the artifact does not say which run made it"
        raise ArtifactMismatch(what, where=where, fix="give the run's recipe or file")
    if store is None:
        is_local = artifact.store.is_local
        store = str(Path(artifact.store.root).resolve()) if is_local else artifact.store.url
    resources = translated(info.run.get("resources", {}))
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
