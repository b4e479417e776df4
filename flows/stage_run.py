"""One stage in one flow run: what is missing of it, how far it is, and what failed.

What is missing is read from the store before anything is begun, and again at the end: the state of
a task run decides nothing but whether its shards are tried again.
"""

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import get_run_logger

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.failure_limits import failures_allowed
from deepspec.artifacts.missing import missing
from deepspec.artifacts.run import Run
from deepspec.artifacts.stages import STAGES
from deepspec.artifacts.status import StageStatus, training_lines
from deepspec.config.retries import StageLimits
from deepspec.errors import DeepSpecError, ShardsFailed, UserError
from deepspec.process.launch import RunRequest
from deepspec.process.shard_ranges import shard_list
from flows.shard_scheduler import SHARD_DIGITS, Lane, ShardScheduler
from flows.stage_failures import StageFailures
from flows.stage_progress import StageProgress


class StageRun:
    """A stage at work: what its lanes share.

    Args:
        request: What the user requested, for the commands of its children.
        before: The stage as it was when its work began; its missing shards are made.
        only_chosen: Whether a stage without shards, but with units, is to make these units alone.
    """

    def __init__(
        self, request: RunRequest, run: Run, before: StageStatus, *, only_chosen: bool = False
    ) -> None:
        self.request, self.run, self.before = request, run, before
        stage, resources = STAGES[before.stage], run.config.resources
        self.sharded = stage.is_sharded and bool(before.missing)
        self.units = before.missing if only_chosen and stage.is_selectable else None
        num_shards = before.committed + len(before.missing)
        self.failures = StageFailures(
            before.stage,
            sharded=self.sharded,
            allowed=failures_allowed(resources.retries, num_shards),
        )
        history = functools.partial(training_lines, run) if self.stage == "train" else tuple
        self.progress = StageProgress(
            run.config.name, before, sharded=self.sharded, history=history
        )
        self.scheduler = ShardScheduler(
            before.missing if self.sharded else [0],  # a stage without shards is one piece of work
            resources.runner.shards_per_task,
            60 * resources.runner.group_minutes,
            self.limits,
        )
        self.left = threading.Event()
        """Set once nothing of the stage is to go on: what waits for something else than a child of
        this process looks at it.
        """

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.before.stage

    @property
    def artifact(self) -> Artifact:
        """What the stage makes."""
        return self.run.artifact(self.stage)

    @property
    def limits(self) -> StageLimits:
        """How often, and for how long, the stage's work is tried."""
        return self.run.config.resources.retries.limits(self.stage)

    def name(self, group: Sequence[int]) -> str:
        """What a lane does with the group: `hidden 0017-0042`."""
        if not self.sharded:
            return self.stage
        return f"{self.stage} {shard_list(group, digits=SHARD_DIGITS)}"

    def chosen(self, group: list[int]) -> list[int] | None:
        """What a child is to make of the group; None: the stage as a whole."""
        return group if self.sharded else self.units

    def missing(self, group: Sequence[int]) -> list[int]:
        """Shards of the group that are not committed, by the store; a stage without shards shows
        that at its end.
        """
        if not self.sharded:
            return list(group)
        return missing(self.run, self.stage, group)

    def count_made(self, lane: Lane, group: Sequence[int]) -> int:
        """Shards of the group that are committed; the records of those that no event named count as
        such.
        """
        made = set(group) - set(self.missing(group))
        if unreported := self.progress.unreported(made):
            for record in self.artifact.records(unreported).values():
                self.progress.add_record(record, lane=lane.name)
        return len(made)

    def _still_missing(self, group: Sequence[int]) -> list[int]:
        """Those that are to be tried again: all, where the store does not answer; the next child
        skips what is there.
        """
        try:
            return self.missing(group)
        except (DeepSpecError, OSError) as error:
            get_run_logger().warning("what is missing cannot be read from the store: %s", error)
            return list(group)

    def on_event(self, event: Mapping[str, Any], *, lane: str = "") -> None:
        """One event of a lane's child: a shard that failed for good counts at once, long before its
        group ends.
        """
        if event["event"] == "failed" and self.sharded and not event["transient"]:
            self.failures.add({event["shard"]: {"what": event["what"], "transient": False}})
            self._failures_changed()
        self.progress.on_event(event, lane=lane)

    def group_failed(self, error: DeepSpecError, lane: Lane, group: Sequence[int]) -> None:
        """What may be tried again of the group goes back, the rest is lost, and too much of it ends
        the stage.
        """
        if isinstance(error, ShardsFailed) and self.sharded:
            lane.failed_in_a_row = 0
            self.failures.add(error.failures)
            self.failures.give_up(self.scheduler.give_back(lane, error.retryable))
        else:
            self._child_failed(error, lane, group)
        self._failures_changed()

    def _child_failed(self, error: DeepSpecError, lane: Lane, group: Sequence[int]) -> None:
        """The group failed as a whole, because of its shards or of its lane; where other lanes do
        well, it may be the lane.
        """
        left = self._still_missing(group)
        final = self.failures.for_good(left)
        missing = [shard for shard in left if shard not in final]
        retried = self._may_succeed_elsewhere(error, lane)
        made = len(group) - len(left)
        is_dead = self.scheduler.lane_failed(lane, made=made)
        if is_dead:
            get_run_logger().warning(
                "lane %s is left out: it failed %d times in a row; others go on",
                lane.name,
                lane.failed_in_a_row,
            )
        self.failures.add_group(error, missing, retried=retried)
        spent = missing
        if retried:
            # With a worker that dies every minute most shards of a group are given back before
            # anything has tried them.
            spent = self.scheduler.give_back(lane, missing, count=not (is_dead or made))
        self.failures.give_up(spent, error)
        if isinstance(error, UserError) and not retried:
            self.scheduler.close()

    def _may_succeed_elsewhere(self, error: DeepSpecError, lane: Lane) -> bool:
        others = [other for other in self.scheduler.lanes if other is not lane and not other.dead]
        if isinstance(error, UserError):
            return any(other.shards for other in others)
        return error.transient or (self.sharded and bool(others))

    def _failures_changed(self) -> None:
        retries, given_up = self.scheduler.retried, len(self.failures.given_up)
        self.progress.set_counts(retries=retries, failed=given_up)
        if self.failures.too_many:
            self.scheduler.close()
