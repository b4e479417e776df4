"""The lanes of a stage at work: a thread for each, and a task run for each group of shards."""

import contextlib
import threading
import time
from contextvars import copy_context
from typing import Protocol

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from deepspec.errors import DeepSpecError, TransientError
from deepspec.process.scopes import scope
from flows.shard_scheduler import Lane
from flows.stage_run import StageRun

# that a lane may take to end once its child is gone: a task run is still to be reported
END_S = 30.0
LANES_S = 2.0  # between two looks for lanes that were added


class Executor(Protocol):
    """Where the work is done."""

    lanes: list[Lane]
    """More may be appended while there is work."""

    def work(self, lane: Lane, name: str, shards: list[int] | None) -> None:
        """Make these shards (None: the stage as a whole) and return when they are committed.

        Raises:
            DeepSpecError: some were not, or nothing could be made.
        """


def work_off(stage_run: StageRun, executor: Executor) -> None:
    """Keep every lane busy until nothing is left; a group that fails does not stop the others."""
    stage_run.scheduler.lanes = executor.lanes
    stage_run.progress.show_lanes(executor.lanes)
    threads = list[threading.Thread]()
    try:
        # However this block is left, nothing more is assigned, and no child runs any more; so the
        # lanes come to their end.
        with (
            scope(stage_run.run.config.resources.runner.patience_s),
            contextlib.closing(stage_run.scheduler),
            contextlib.ExitStack() as stack,
        ):
            stack.callback(stage_run.left.set)
            while True:
                for lane in executor.lanes[len(threads) :]:
                    threads.append(_start_lane(stage_run, executor, lane))
                alive = [thread for thread in threads if thread.is_alive()]
                if alive:
                    alive[0].join(LANES_S)
                elif len(threads) == len(executor.lanes):
                    break
    finally:
        for thread in threads:
            thread.join(END_S)


def _start_lane(stage_run: StageRun, executor: Executor, lane: Lane) -> threading.Thread:
    target, arguments = copy_context().run, (serve, stage_run, executor, lane)
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def serve(stage_run: StageRun, executor: Executor, lane: Lane) -> None:
    """One lane: group after group, until there is nothing more for it."""
    scheduler = stage_run.scheduler
    while group := scheduler.next_group(lane):
        lane.doing, lane.began = stage_run.name(group), time.monotonic()
        made = 0
        try:
            stage_run.progress.update_lanes()
            work_on_named = work_on.with_options(task_run_name=lane.doing)
            work_on_named(lane.doing, stage_run, executor, lane, group, return_state=True)
            made = stage_run.count_made(lane, group)
        except (DeepSpecError, OSError) as error:
            # The store does not answer just now: what became of the group is seen at the end.
            get_run_logger().warning("%s: %s", lane.doing, error)
        except BaseException:
            # Its thread ends with that, so it no longer counts among those that could go on.
            lane.dead = True
            raise
        finally:
            lane.doing = ""
            scheduler.group_ended(lane, group, made, time.monotonic() - lane.began)
        stage_run.progress.update_lanes()


@task(name="shards", persist_result=False, cache_policy=NO_CACHE)
def work_on(
    name: str, stage_run: StageRun, executor: Executor, lane: Lane, group: list[int]
) -> None:
    """A group of shards at one lane. It is not tried again here: what failed goes back to all
    lanes.
    """
    try:
        executor.work(lane, name, stage_run.chosen(group))
    except DeepSpecError as error:
        stage_run.group_failed(error, lane, group)
        raise
    except OSError as error:
        # No process, no file: this machine has too little of something just now.
        what = f"{name} could not be done here: {type(error).__name__}: {error}"
        failure = TransientError(what, where=lane.name, fix="it is tried again by itself")
        stage_run.group_failed(failure, lane, group)
        raise
    lane.failed_in_a_row = 0
    get_run_logger().info("%s: done", name)
