"""The executor of several machines: a lane is a child flow run, which a worker of a pool takes, on
any of its machines.

The child is a run of the stage's own deployment with the shards of the group; the store is all that
it shares with this run. Its state shows when to look there, not what was made.
"""

import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import NoReturn, TypeVar

import httpx
from prefect import get_run_logger
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import flow_run
from prefect.states import Cancelling, Crashed

from deepspec.artifacts.leases import Leases
from deepspec.artifacts.stages import STAGES
from deepspec.errors import ChildFailed, ConfigError, DeepSpecError, ShardsFailed, TransientError
from deepspec.process.scopes import Stopped
from deepspec.process.shard_ranges import shard_list
from flows.automations import PART
from flows.child_runs import (
    cancel_unbegun,
    patiently,
    read_child,
    read_error,
    set_child_state,
    start_child,
)
from flows.parameters import title
from flows.shard_scheduler import Lane
from flows.stage_run import StageRun
from flows.store_watch import StoreWatch
from flows.work_pool import WorkPool

POLL_S = 2.0  # between two looks at a child's state
START_S = 60.0  # that a child may take beyond the deadline of its own children, to start and to end
RETRIED = "it is tried again by itself"
T = TypeVar("T")


class PoolExecutor:
    """Child runs on the workers of a pool, as many at a time as there are workers: each takes every
    GPU of its machine.
    """

    def __init__(self, stage_run: StageRun, leases: Leases) -> None:
        self.stage_run, self.leases = stage_run, leases
        resources = stage_run.run.config.resources
        self.flow = STAGES[stage_run.stage].flow
        self.title = f"{self.flow}/{resources.runner.workers}"
        self.pool = self._patiently(lambda: WorkPool(self.title, stage_run.progress))
        self.num_lanes = resources.devices.lanes if stage_run.sharded else 1
        self.lanes = list[Lane]()
        self.alive = set[str]()  # runs whose leases are renewed
        self.silent = set[str]()  # runs whose leases are not renewed any more
        self.waiting = set[str]()  # lanes whose children no worker has taken yet
        self.num_started = 0
        self._starting = threading.Lock()  # Prefect counts a run's children without one
        self._patiently(cancel_unbegun)
        self._add_lanes()
        threading.Thread(target=copy_context().run, args=(self._look,), daemon=True).start()

    def work(self, lane: Lane, name: str, shards: list[int] | None) -> None:
        """As `Executor` has it."""
        child = self._start(shards)
        get_run_logger().info("%s: is run %r on the pool %r", name, child.name, self.pool.name)
        try:
            ended = self._follow(child, lane)
            if ended.state is None or not ended.state.is_completed():
                self._until_quiet(child)
        except TransientError:
            self._cancel(child)
            self._until_quiet(child)
            raise
        except BaseException:
            self._cancel(child)
            raise
        finally:
            self.waiting.discard(lane.name)
        self._check(ended, shards or [])

    def _start(self, shards: list[int] | None) -> FlowRun:
        """A child run for these shards.

        Raises:
            ConfigError: the deployment is gone.
        """
        request = self.stage_run.request
        store = self.stage_run.run.config.store
        # What failed there goes back to all lanes here, so it is not tried again there.
        own = [
            "resources.runner.kind=local",
            "resources.devices.lanes=null",
            f"resources.retries.stages.{self.stage_run.stage}.times=0",
        ]
        source = request.source
        if Path(source).is_file():
            source = str(Path(source).absolute())
        chosen = {} if shards is None else {"shards": shard_list(shards)}
        parameters = {
            "recipe": source,
            "overrides": [*request.overrides, *own],
            "store": store if "://" in store else str(Path(store).absolute()),
            **chosen,
        }
        span = chosen.get("shards", "")
        name = title(self.flow, source, span) + PART
        with self._starting:
            self.num_started += 1
            number = self.num_started
        # The key stays the same where the server's answer gets lost: the run may have been created.
        key = f"{flow_run.id}-{flow_run.run_count}-{self.stage_run.stage}-{number}-{span}"

        def start() -> FlowRun:
            with self._starting:
                return start_child(self.pool.deployment.id, name, parameters, key=key)

        try:
            return self._patiently(start)
        except ObjectNotFound:
            raise ConfigError(
                f"the deployment {self.title!r} is gone from the Prefect server",
                where="resources.runner.workers",
                fix="run `python -m flows.setup` again",
            ) from None

    def _follow(self, child: FlowRun, lane: Lane) -> FlowRun:
        """The child as it was when it had ended.

        Raises:
            TransientError: it took too long, gave no sign of life, or is gone.
            Stopped: the stage was left.
        """
        deadline_s, began = self.stage_run.limits.deadline_s, None
        while True:
            try:
                now = self._patiently(lambda: read_child(child))
            except ObjectNotFound:
                raise TransientError("its run was deleted", where=child.name, fix=RETRIED) from None
            state = now.state
            if state is not None and state.is_final():
                return now
            if state is not None and (state.is_scheduled() or state.is_pending()):
                self.waiting.add(lane.name)
            else:
                self.waiting.discard(lane.name)
                began = began or time.monotonic()
            if str(child.id) in self.silent:
                self._mark_crashed(child)
            if began and deadline_s and time.monotonic() - began > deadline_s + START_S:
                what = f"it did not finish in {deadline_s + START_S:g} s"
                raise TransientError(what, where=child.name, fix=RETRIED)
            self._pause(POLL_S)

    def _mark_crashed(self, child: FlowRun) -> NoReturn:
        message = "no sign of life in the store: its process or machine is gone"
        self._patiently(lambda: set_child_state(child, Crashed(message=message)))
        raise TransientError("it gave no sign of life any more", where=child.name, fix=RETRIED)

    def _until_quiet(self, child: FlowRun) -> None:
        """Return when it works on nothing: cut off from the server or being ended it may go on for
        a while, and nothing is made twice.
        """
        while str(child.id) in self.alive:
            self._pause(POLL_S)

    def _check(self, child: FlowRun, shards: list[int]) -> None:
        """Return if everything is there.

        Raises:
            DeepSpecError: why it is not, as the child reported it.
        """
        state = child.state
        is_sharded, url = self.stage_run.sharded, self.stage_run.artifact.url
        is_completed = state is not None and state.is_completed()
        missing = self.stage_run.missing(shards) if is_sharded else []
        if not missing and (is_sharded or is_completed):
            return
        state_name, message = (state.name, state.message) if state else ("", "")
        outcome = f"run {child.name!r} ended {state_name}: {message or ''}".strip(": ")
        if is_completed:
            raise TransientError(
                f"{outcome}; but of its shards {shard_list(missing)} are not there",
                where=url,
                fix="the workers must read the same run file, and reach the same store under its "
                f"name; {RETRIED}",
            )
        if state is None or not state.is_failed() or state.is_crashed():
            raise TransientError(outcome, where=child.name, fix=RETRIED)
        error = self._patiently(lambda: read_error(child))
        if error is None:
            raise ChildFailed(outcome, where=child.name, fix="see its log")
        if isinstance(error, ShardsFailed) and is_sharded:
            unknown = {"what": outcome, "transient": True}
            error.failures = {shard: error.failures.get(shard, unknown) for shard in missing}
        raise error

    def _look(self) -> None:
        """Until the stage is left: more lanes for workers that came, children that fell silent,
        shards that were committed.
        """
        watch = StoreWatch(self.stage_run.artifact, self.stage_run.before, self.stage_run.progress)
        while not self.stage_run.left.wait(watch.pause_s):
            try:
                watch.poll()
                others = self.leases.others()
                self.alive = {other.lease.run_id for other in others if other.alive}
                self.silent = {other.lease.run_id for other in others} - self.alive
                self._add_lanes()
                self.pool.warn_if_deserted(waiting=bool(self.waiting))
            except (DeepSpecError, OSError, httpx.HTTPError, PrefectException) as error:
                # The next look may succeed.
                get_run_logger().debug("looking for progress: %s", error)

    def _add_lanes(self) -> None:
        wanted = self.num_lanes or self.pool.room()
        self.lanes += [Lane(f"worker #{number}") for number in range(len(self.lanes), wanted)]

    def _cancel(self, child: FlowRun) -> None:
        """Its worker ends it; where the server does not answer, its own deadlines and leases are
        what is left.
        """
        try:
            set_child_state(child, Cancelling())
        except (httpx.HTTPError, ObjectNotFound) as error:
            get_run_logger().warning("run %r was not cancelled: %s", child.name, error)

    def _pause(self, seconds: float) -> None:
        if self.stage_run.left.wait(seconds):
            raise Stopped("the child run was ended with its run")

    def _patiently(self, call: Callable[[], T]) -> T:
        return patiently(call, self._pause, where=f"deployment {self.title}")
