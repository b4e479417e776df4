"""What is missing of a stage: decided here alone, from the store.

A shard is missing while it has no record, or a record made from an upstream shard that has been
replaced since. A stage without shards is missing while it is not sealed. Resume is this and nothing
else: at 10,000 shards it costs two listings and, of sealed artifacts, one table.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import was_trained_on_cache
from deepspec.artifacts.records import Manifest, Record
from deepspec.artifacts.run import Run
from deepspec.artifacts.shard_loop import Work
from deepspec.artifacts.stages import STAGES
from deepspec.errors import ArtifactMismatch, ConfigError


class ShardedStage(NamedTuple):
    """A stage whose shards are made from those of the stage before, ready to work."""

    artifact: Artifact
    upstream: Artifact
    todo: list[Work]


def missing_shards(artifact: Artifact, wanted: Mapping[int, str]) -> list[int]:
    """Shards without a record, or with one that was made from something else than is `wanted`.

    Args:
        artifact: The artifact that is to have them.
        wanted: By shard, the checksum of what it is to be made from.
    """
    return _not_made_from(artifact.records(wanted), wanted)


def _not_made_from(records: Mapping[int, Record], wanted: Mapping[int, str]) -> list[int]:
    return [
        shard
        for shard, upstream in wanted.items()
        if shard not in records or records[shard].upstream != upstream
    ]


def wanted_shards(run: Run, stage: str, shards: Iterable[int] | None = None) -> dict[int, str]:
    """The shards (None: all) that a sharded stage can have now, by number.

    Each with the checksum of the shard that it is made from.
    """
    return {shard: record.checksum for shard, record in run.upstream(stage).records(shards).items()}


def missing(run: Run, stage: str, shards: Iterable[int] | None = None) -> list[int]:
    """The stage's missing shards (of those asked for); `[0]` stands for a stage without shards.

    Nothing is missing of hidden states that training makes by itself.
    """
    artifact = run.artifact(stage)
    if stage == "hidden" and trains_without_cache(run):
        return []
    if STAGES[stage].is_sharded:
        return missing_shards(artifact, wanted_shards(run, stage, shards))
    manifest = artifact.manifest()
    is_whole = manifest is not None and len(artifact.records()) >= manifest.totals["shards"]
    return [] if is_whole else [0]


def missing_units(run: Run, stage: str, units: Iterable[int]) -> list[int]:
    """Those of these units of a stage that are not made from what is sealed before it now."""
    upstream = run.upstream(stage).manifest()
    digest = upstream.digest if upstream else ""
    return missing_shards(run.artifact(stage), dict.fromkeys(units, digest))


def chosen_shards(asked: Iterable[int] | None, available: Iterable[int], stage: str) -> list[int]:
    """The shards that were asked for (None: all), in order.

    Raises:
        ConfigError: there is no such shard.
    """
    known = set(available)
    asked = sorted(known if asked is None else asked)
    unknown = [shard for shard in asked if shard not in known]
    if unknown:
        last = f"0 to {max(known)}" if known else "none"
        raise ConfigError(
            f"the stage {stage!r} has no shard {', '.join(map(str, unknown))}; there are {last}",
            where="--shards",
            fix="leave --shards out to do whatever is missing",
        )
    return asked


def trains_without_cache(run: Run) -> bool:
    """Whether training makes its hidden states; a sealed cache is read in any case."""
    source = run.config.resources.training.source
    return source != "cache" and run.artifact("hidden").manifest() is None


def require_sealed(run: Run, stage: str) -> dict[str, str]:
    """The manifest digests of everything that `stage` reads, by `stage/fingerprint`.

    Where training makes the hidden states by itself, it reads what these are made from.

    Raises:
        ArtifactMismatch: one of them is not finished.
    """
    digests = {}
    without_cache = stage == "train" and trains_without_cache(run)
    for upstream in STAGES["hidden" if without_cache else stage].reads(run.config):
        artifact = run.artifact(upstream)
        manifest = artifact.manifest()
        if manifest is None:
            raise ArtifactMismatch(
                f"the stage {stage!r} reads {upstream!r}, which is not finished",
                where=artifact.url,
                fix=f"run `{run.command(upstream)}` first",
            )
        digests[f"{upstream}/{artifact.key.fingerprint}"] = manifest.digest
    return digests


def inputs_match(run: Run, stage: str, manifest: Manifest) -> bool:
    """Whether the stage was sealed over its inputs as they are now.

    A shard that was made again makes everything after it stale. A draft that was trained without a
    cache names what its hidden states were made from; a cache made since changes nothing.
    """
    without_cache = stage == "train" and not was_trained_on_cache(manifest)
    for name in STAGES["hidden" if without_cache else stage].reads(run.config):
        artifact = run.artifact(name)
        upstream = artifact.manifest()
        key = f"{name}/{artifact.key.fingerprint}"
        if upstream is not None and manifest.inputs.get(key) != upstream.digest:
            return False
    return True


def open_sharded(run: Run, stage: str, shards: Sequence[int] | None) -> ShardedStage:
    """The stage's artifact, created or compared, and the shards to make now.

    Raises:
        ArtifactMismatch: the folder belongs to another recipe, or the stage before is not finished.
        ConfigError: a shard that does not exist.
    """
    require_sealed(run, stage)
    upstream = run.upstream(stage)
    records = upstream.records()
    asked = chosen_shards(shards, records, stage)
    artifact = run.create(stage)
    left = missing_shards(artifact, {shard: records[shard].checksum for shard in asked})
    return ShardedStage(artifact, upstream, [Work(shard, records[shard]) for shard in left])


def seal_if_whole(
    run: Run,
    stage: str,
    *,
    files: Sequence[str] = (),
    before: Callable[[list[Record]], None] = lambda records: None,
) -> Manifest | None:
    """Seal a sharded stage if nothing is missing any more; each worker calls it when it is done.

    Two listings are enough to see that other lanes still work.

    Args:
        run: The run.
        stage: Its stage.
        files: Further files to seal.
        before: Given all records, writes what is sealed with them.
    """
    artifact, upstream = run.artifact(stage), run.upstream(stage)
    if set(upstream.record_shards()) - set(artifact.record_shards()):
        return None
    wanted, records = wanted_shards(run, stage), artifact.records()
    if _not_made_from(records, wanted):
        return None
    digests = require_sealed(run, stage)
    manifest = artifact.manifest()
    if (
        manifest is not None
        and manifest.inputs == digests
        and list(artifact.sealed_records()) == list(wanted)
    ):
        return manifest
    before([records[shard] for shard in wanted])
    return artifact.seal(shards=wanted, files=files, inputs=digests, committed=records)
