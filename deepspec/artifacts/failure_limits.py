"""How many shards of a stage may fail for good before no more are begun."""

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import input_artifact
from deepspec.config.retries import RetriesConfig

TOO_MANY = "more failed for good than resources.retries.max_failed allows"
FEW_FAILED = 10  # whatever their share: a small stage is worked through


def failures_allowed(retries: RetriesConfig, num_shards: int) -> int:
    """Shards of a stage of `num_shards` that may fail; none where the setting allows none."""
    return max(FEW_FAILED if retries.max_failed else 0, int(retries.max_failed * num_shards))


def stage_size(artifact: Artifact, num_todo: int) -> int:
    """Shards of the whole stage, of which a worker was given `num_todo`.

    The others are found in the stage before.
    """
    before = [input_artifact(artifact.store, entry) for entry in artifact.key.inputs[:1]]
    known = len(artifact.record_shards()) + num_todo
    return max([known, *(len(each.record_shards()) for each in before)])
