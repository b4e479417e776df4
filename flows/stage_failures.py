"""What failed of a stage in one run, and what follows from it: whether more is begun, and the error
that the run ends with.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepspec.artifacts.failure_limits import TOO_MANY
from deepspec.artifacts.status import StageStatus
from deepspec.errors import ChildFailed, DeepSpecError, ShardsFailed
from deepspec.process.launch import RunRequest

MAX_NAMED = 20  # failed shards whose reasons are in the error's text


class StageFailures:
    """Why shards of a stage failed, and how many may.

    Args:
        stage: The stage's name.
        sharded: Whether its shards are known; else it is one piece of work.
        allowed: Shards that may fail for good before no more are begun.
    """

    def __init__(self, stage: str, *, sharded: bool, allowed: int) -> None:
        self.stage, self.sharded, self.allowed = stage, sharded, allowed
        self.reasons: dict[int, dict[str, Any]] = {}  # the newest failure of each shard
        self.given_up = set[int]()  # not tried again in this run
        # Failed for good. Of a group whose child failed as a whole it is one: a single shard may
        # have brought the child down.
        self.lost = set[int]()
        self.error: DeepSpecError | None = None

    @property
    def too_many(self) -> bool:
        """Whether no more shards are to be begun; those under way are finished."""
        return len(self.lost) > self.allowed

    def for_good(self, shards: Iterable[int]) -> list[int]:
        """Those of the shards that failed for good: another try would end the same way."""
        return [
            shard
            for shard in shards
            if shard in self.reasons and not self.reasons[shard].get("transient")
        ]

    def add(self, failures: Mapping[int, dict[str, Any]]) -> None:
        """Failures of single shards, as `ShardsFailed` has them."""
        self.reasons.update(failures)
        final = self.for_good(failures)
        self.lost.update(final)
        self.given_up.update(final)

    def add_group(self, error: DeepSpecError, missing: Sequence[int], *, retried: bool) -> None:
        """A group's child failed as a whole, with these shards missing."""
        if self.sharded:
            failure = {**error.to_json(), "transient": retried}
            self.reasons.update(dict.fromkeys(missing, failure))

    def give_up(self, shards: Sequence[int], error: DeepSpecError | None = None) -> None:
        """These shards are not tried again; `error` is that of their child, if it failed as a
        whole.
        """
        if self.sharded:
            self.given_up.update(shards)
        if not shards or error is None:
            return
        if not error.transient:
            self.lost.add(shards[0])
        if not error.transient or not self.sharded:
            self.error = error

    def final_error(self, after: StageStatus, request: RunRequest) -> DeepSpecError:
        """Why the stage is not finished, naming every missing shard and how to resume.

        Args:
            after: The stage as the store has it now, at the end of the run.
            request: What the user requested, for the command that resumes it.
        """
        if self.error is not None:
            if self.sharded:
                self.error.failures = self._missing(after)
            return self.error
        if not self.sharded:
            return ChildFailed(
                f"the stage {self.stage!r} is not finished, and no child reported why",
                where=after.artifact_url,
                fix="see the flow run's log; the same run again goes on",
            )
        failures = self._missing(after)
        named = [shard for shard in failures if not self.too_many or shard in self.reasons]
        reasons = [f"shard {shard}: {failures[shard]['what']}" for shard in named[:MAX_NAMED]]
        if len(named) > MAX_NAMED:
            reasons.append(f"and {len(named) - MAX_NAMED} more")
        num_shards = after.committed + len(failures)
        what = f"{len(named)} of {num_shards} shards of the stage {self.stage!r} failed"
        if self.too_many:
            not_begun = len(failures) - len(named)
            what += f"; {not_begun} were not begun, because {TOO_MANY} ({self.allowed})"
        return ShardsFailed(
            f"{what}: {'; '.join(reasons)}",
            where=after.artifact_url,
            fix=f"run `{request.shown(self.stage, after.missing)}`, "
            "or the same run again: it does only what is missing",
            failures=failures,
        )

    def _missing(self, after: StageStatus) -> dict[int, dict[str, Any]]:
        """Every missing shard with its reason."""
        what = "its task did not end; see the flow run's log"
        unknown = {"what": "it was not begun" if self.too_many else what, "transient": True}
        return {shard: self.reasons.get(shard, unknown) for shard in after.missing}
