"""One stage in one flow run: its missing shards dealt to lanes, a task run for each group, and what
became of them.

What is missing is read from the store before anything is begun, and again at the end: a task's own
state decides nothing but whether its shards are tried again.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from typing import Any, Protocol

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from deepspec.artifacts.missing import missing
from deepspec.artifacts.run import Run
from deepspec.artifacts.shard_loop import TOO_MANY, failures_allowed
from deepspec.artifacts.stages import STAGES
from deepspec.artifacts.status import StageStatus, training_lines
from deepspec.config.run import RunConfig
from deepspec.errors import ChildFailed, DeepSpecError, ShardsFailed, TransientError, UserError
from deepspec.process.launch import RunRequest, scope
from deepspec.process.shard_ranges import shard_list
from flows.shard_scheduler import SHARD_DIGITS, Lane, ShardScheduler
from flows.stage_progress import StageProgress

# that a lane may take to end once its child is gone: a task run is still to be reported
END_S = 30.0
LANES_S = 2.0  # between two looks for lanes that came
MAX_NAMED = 20  # failed shards whose reasons are spelt out


class Executor(Protocol):
    """Where the work is done."""

    lanes: list[Lane]
    """More may be appended while there is work."""

    def work(self, lane: Lane, name: str, shards: list[int] | None) -> None:
        """Make these shards (None: the stage as a whole) and return when they are committed.

        Raises:
            DeepSpecError: some were not, or nothing could be made.
        """


class StageRun:
    """What the tasks of a stage share, and why shards of it failed."""

    def __init__(
        self, request: RunRequest, config: RunConfig, before: StageStatus, *, some: bool = False
    ) -> None:
        self.request, self.config, self.before, self.stage = request, config, before, before.stage
        self.sharded = STAGES[before.stage].is_sharded and bool(before.missing)
        self.whole = before.missing if some and STAGES[before.stage].is_selectable else None
        self.failures: dict[int, dict[str, Any]] = {}
        # failed for good; one of a group whose child failed as a whole: one shard may have brought
        # it down
        self.lost: set[int] = set()
        self.failed: set[int] = set()  # not tried again in this run
        self.allowed = failures_allowed(
            config.resources.retries, before.committed + len(before.missing)
        )
        self.error: DeepSpecError | None = None
        self.limits = config.resources.retries.limits(self.stage)
        history = functools.partial(training_lines, Run(config)) if self.stage == "train" else tuple
        self.progress = StageProgress(config.name, before, sharded=self.sharded, history=history)
        todo = before.missing if self.sharded else [0]  # a stage without shards is dealt as one
        self.left = threading.Event()
        """Set once nothing of the stage is to go on: what waits for something else than a child
        of this process looks at it.
        """
        self.scheduler = ShardScheduler(
            todo,
            config.resources.runner.shards_per_task,
            60 * config.resources.runner.group_minutes,
            self.limits,
        )

    def work(self, executor: Executor) -> None:
        """Keep every lane busy until nothing is left; a group that fails does not stop the
        others.
        """
        self.scheduler.lanes = executor.lanes
        self.progress.show_lanes(executor.lanes)
        threads = list[threading.Thread]()
        try:
            # Left in whatever way, nothing more is dealt, and no child runs any more; so the lanes
            # come to their end.
            with (
                scope(self.config.resources.runner.stop_s),
                contextlib.closing(self.scheduler),
                contextlib.ExitStack() as stack,
            ):
                stack.callback(self.left.set)
                while len(threads) < len(executor.lanes) or any(
                    thread.is_alive() for thread in threads
                ):
                    for lane in executor.lanes[len(threads) :]:
                        threads.append(
                            threading.Thread(
                                target=copy_context().run,
                                args=(self.serve, executor, lane),
                                daemon=True,
                            )
                        )
                        threads[-1].start()
                    next((thread for thread in threads if thread.is_alive()), threads[0]).join(
                        LANES_S
                    )
        finally:
            for thread in threads:
                thread.join(END_S)

    def serve(self, executor: Executor, lane: Lane) -> None:
        """One lane: group after group, each a task run of its own."""
        while group := self.scheduler.next_group(lane):
            lane.doing, lane.began, made = self.name(group), time.monotonic(), 0
            try:
                self.progress.update_lanes()
                work_on.with_options(task_run_name=lane.doing)(
                    lane.doing, self, executor, lane, group, return_state=True
                )
                made = self.count_made(lane, group)
            except (DeepSpecError, OSError) as error:
                # the store cannot be asked just now: what became of the group is seen at the end
                get_run_logger().warning("%s: %s", lane.doing, error)
            except BaseException:
                # its thread ends with that: it counts no longer among those who could go on
                lane.dead = True
                raise
            finally:
                lane.doing = ""
                self.scheduler.group_ended(lane, group, made, time.monotonic() - lane.began)
            self.progress.update_lanes()

    def name(self, group: Sequence[int]) -> str:
        """What a lane does with the group: `hidden 0017-0042`."""
        return (
            f"{self.stage} {shard_list(group, digits=SHARD_DIGITS)}" if self.sharded else self.stage
        )

    def count_made(self, lane: Lane, group: Sequence[int]) -> int:
        """Shards of the group that are committed; of those that no child could tell, the progress
        is told what their records say.
        """
        made = set(group) - set(self.missing(group))
        if unreported := self.progress.unreported(made):
            for record in Run(self.config).artifact(self.stage).records(unreported).values():
                fields = record.model_dump(
                    include={"shard", "rows", "tokens", "num_bytes", "rejected"}
                )
                self.progress.on_event(
                    {"event": "shard", "stage": self.stage, **fields}, lane=lane.name
                )
        return len(made)

    def missing(self, group: Sequence[int]) -> list[int]:
        """Shards of the group that are not committed, as the store says; a stage without shards
        says so at its end.
        """
        if not self.sharded:
            return list(group)
        return missing(Run(self.config), self.stage, group)

    def still_missing(self, group: Sequence[int]) -> list[int]:
        """Those that are to be tried again: all, where the store is away; the next child passes
        over what is there.
        """
        try:
            return self.missing(group)
        except (DeepSpecError, OSError) as error:
            get_run_logger().warning("the store cannot be asked what is missing: %s", error)
            return list(group)

    def asked(self, group: list[int]) -> list[int] | None:
        return group if self.sharded else self.whole

    def on_event(self, event: Mapping[str, Any], *, lane: str = "") -> None:
        """One event of a lane's child: a shard that failed for good counts at once, long before
        its group ends.
        """
        if event["event"] == "failed" and self.sharded and not event["transient"]:
            self.failures[event["shard"]] = {"what": event["what"], "transient": False}
            self.lost.add(event["shard"])
            self.failed.add(event["shard"])
            self.progress.set_counts(retries=self.scheduler.retried, failed=len(self.failed))
            if self.too_many_failed():
                self.scheduler.close()
        self.progress.on_event(event, lane=lane)

    def group_failed(self, error: DeepSpecError, lane: Lane, group: Sequence[int]) -> None:
        """A group failed: what may be tried again goes back, the rest is lost, and too much of
        it ends the stage.
        """
        if isinstance(error, ShardsFailed) and self.sharded:
            lane.failed_in_a_row = 0
            self.failures.update(error.failures)
            self.lost |= set(self.given_up(list(error.failures)))
            self.failed |= self.given_up(list(error.failures)).keys() | set(
                self.scheduler.give_back(lane, error.retryable)
            )
        else:
            self._group_failed_whole(error, lane, group)
        self.progress.set_counts(retries=self.scheduler.retried, failed=len(self.failed))
        if self.too_many_failed():
            self.scheduler.close()

    def _group_failed_whole(self, error: DeepSpecError, lane: Lane, group: Sequence[int]) -> None:
        """Whether the shards or the lane are to blame, nobody said; where other lanes do well,
        it may be the lane.
        """
        others = [other for other in self.scheduler.lanes if other is not lane and not other.dead]
        again = error.transient or (isinstance(error, ShardsFailed) and bool(error.retryable))
        if isinstance(error, UserError):
            again = any(other.shards for other in others)
        elif not error.transient and self.sharded:
            again = bool(others)
        left = self.still_missing(group)
        missing = [shard for shard in left if shard not in self.given_up([shard])]
        self.failures.update(
            {shard: {**error.to_json(), "transient": again} for shard in missing}
            if self.sharded
            else {}
        )
        made = len(group) - len(left)
        dead = self.scheduler.lane_failed(lane, made=made)
        if dead:
            get_run_logger().warning(
                "lane %s is left out: it failed %d times in a row; others go on",
                lane.name,
                lane.failed_in_a_row,
            )
        # With a worker that dies every minute most shards of a group are given back before anybody
        # has tried them.
        spent = (
            self.scheduler.give_back(lane, missing, count=not (dead or made))
            if again
            else list(missing)
        )
        self.failed |= set(spent) if self.sharded else set()
        if spent and not error.transient:
            self.error = error
            self.lost |= set(spent[:1])
        elif spent and not self.sharded:
            self.error = error
        if isinstance(error, UserError) and not again:
            self.scheduler.close()

    def given_up(self, shards: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Those of the shards that failed for good: trying them again would end the same way."""
        return {
            shard: self.failures[shard]
            for shard in shards
            if shard in self.failures and not self.failures[shard].get("transient")
        }

    def too_many_failed(self) -> bool:
        """Whether no more shards are to be begun; those under way are finished."""
        return len(self.lost) > self.allowed

    def failure(self, after: StageStatus) -> DeepSpecError:
        """Why the stage is not finished, naming every missing shard and how to resume."""
        stopped = self.too_many_failed()
        unknown = {
            "what": "it was not begun"
            if stopped
            else "its task did not end; see the flow run's log",
            "transient": True,
        }
        failures = {shard: self.failures.get(shard, unknown) for shard in after.missing}
        if self.error is not None:
            self.error.failures = failures if self.sharded else self.error.failures
            return self.error
        if not self.sharded:
            what = f"the stage {self.stage!r} is not finished, and no child said why"
            return ChildFailed(
                what,
                where=after.artifact_url,
                fix="see the flow run's log; the same run again goes on",
            )
        named = [shard for shard in failures if not stopped or shard in self.failures]
        reasons = [f"shard {shard}: {failures[shard]['what']}" for shard in named[:MAX_NAMED]]
        more = [f"and {len(named) - MAX_NAMED} more"] if len(named) > MAX_NAMED else []
        early = (
            f"; {len(failures) - len(named)} were not begun, because {TOO_MANY} ({self.allowed})"
            if stopped
            else ""
        )
        what = f"{len(named)} of {after.committed + len(failures)} shards of the stage {self.stage!r} failed{early}: "
        fix = f"run `{self.request.shown(self.stage, after.missing)}`, or the same run again: it does only what is missing"
        return ShardsFailed(
            what + "; ".join([*reasons, *more]),
            where=after.artifact_url,
            fix=fix,
            failures=failures,
        )


@task(name="shards", persist_result=False, cache_policy=NO_CACHE)
def work_on(name: str, run: StageRun, executor: Executor, lane: Lane, group: list[int]) -> None:
    """A group of shards at one lane. It is not tried again here: what failed goes back to all
    lanes.
    """
    try:
        executor.work(lane, name, run.asked(group))
    except DeepSpecError as error:
        run.group_failed(error, lane, group)
        raise
    except OSError as error:
        # no process, no file: this machine has too little of something just now
        what, fix = (
            f"{name} could not be done here: {type(error).__name__}: {error}",
            "it is tried again by itself",
        )
        run.group_failed(TransientError(what, where=lane.name, fix=fix), lane, group)
        raise
    lane.failed_in_a_row = 0
    get_run_logger().info("%s: done", name)
