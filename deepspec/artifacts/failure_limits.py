"""How many shards of a stage may fail for good before no more are begun."""

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import input_artifact
from deepspec.config.retries import RetriesConfig

TOO_MANY = "more failed for good than resources.retries.max_failed allows"
FEW_FAILED = 10  # whatever their share: a small stage is worked through


def few_failed(retries: RetriesConfig) -> int:
    """Shards that may fail whatever their share; none where the setting allows none."""
    return FEW_FAILED if retries.max_failed else 0


def failures_allowed(retries: RetriesConfig, num_shards: int) -> int:
    """Shards of a stage of `num_shards` that may fail."""
    return max(few_failed(retries), int(retries.max_failed * num_shards))


def stage_size(artifact: Artifact, num_todo: int) -> int:
    """Shards of the whole stage, of which a worker was given `num_todo`.

    The others are found in the stage before.
    """
    sizes = [len(artifact.record_shards()) + num_todo]
    for entry in artifact.key.inputs[:1]:
        sizes.append(len(input_artifact(artifact.store, entry).record_shards()))
    return max(sizes)
