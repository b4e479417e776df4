"""The executor of several machines: a lane is a child flow run, which a worker of a pool takes, on
whichever machine it runs.

The child is a run of the stage's own deployment with the shards of the group; the store is all that
it shares with this one. Its state says when to look there, not what was made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import flow_run
from prefect.states import Cancelling, Crashed

from deepspec.artifacts.leases import Leases
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import noted_failures, read_failures
from deepspec.artifacts.stages import STAGES
from deepspec.errors import (
    ChildFailed,
    ConfigError,
    DeepSpecError,
    ShardsFailed,
    TransientError,
    error_named,
)
from deepspec.process.launch import Stopped
from deepspec.process.shard_ranges import shard_list
from flows.automations import PART
from flows.lease_wait import GROUP
from flows.parameters import title
from flows.pool import WorkPool
from flows.shard_scheduler import Lane
from flows.stage_run import StageRun
from flows.store_watch import StoreWatch

POLL_S = 2.0  # between two looks at a child's state
START_S = 60.0  # that a child may take beyond the deadline of its own children, to start and to end
T = TypeVar("T")


class PoolExecutor:
    """Child runs on the workers of a pool, as many at a time as there are workers: each takes
    every GPU of its machine.
    """

    def __init__(self, run: StageRun, leases: Leases) -> None:
        self.run, self.leases, settings = run, leases, run.config.resources
        self.flow = STAGES[run.stage].flow
        self.title = f"{self.flow}/{settings.runner.workers}"
        self.pool = self._patiently(lambda: WorkPool(self.title, run.progress))
        self.artifact = Run(run.config).artifact(run.stage)
        self.fixed = settings.devices.lanes if run.sharded else 1
        self.lanes = list[Lane]()
        self.alive = set[str]()  # runs whose leases are renewed, and
        self.silent = set[str]()  # those whose leases nobody renews any more
        self.waiting = set[str]()  # lanes whose children no worker has taken yet
        self.tries = 0
        self._making = threading.Lock()  # Prefect counts a run's children without one
        self._patiently(self._cancel_left)
        self._add_lanes()
        threading.Thread(target=copy_context().run, args=(self._look,), daemon=True).start()

    def work(self, lane: Lane, name: str, shards: list[int] | None) -> None:
        before = noted_failures(self.artifact)
        with self._making:
            self.tries += 1
            # not another one where the server's answer got lost: the run may have been made
            number = self.tries
        try:
            child = self._patiently(lambda: self._start(number, shards))
        except ObjectNotFound:
            what, fix = (
                f"the deployment {self.title!r} is gone from the Prefect server",
                "run `python -m flows.setup` again",
            )
            raise ConfigError(what, where="resources.runner.workers", fix=fix) from None
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
        self._judge(ended, shards or [], before)

    def _start(self, number: int, shards: list[int] | None) -> FlowRun:
        with self._making:
            request, config = self.run.request, self.run.config
            source = (
                str(Path(request.source).absolute())
                if Path(request.source).is_file()
                else request.source
            )
            store = config.store if "://" in config.store else str(Path(config.store).absolute())
            # What failed there goes back to all lanes here, so it is not tried again there.
            own = [
                "resources.runner.kind=local",
                "resources.devices.lanes=null",
                f"resources.retries.stages.{self.run.stage}.times=0",
            ]
            chosen = {} if shards is None else {"shards": shard_list(shards)}
            name = title(self.flow, source, chosen.get("shards", "")) + PART
            key = f"{flow_run.id}-{flow_run.run_count}-{self.run.stage}-{number}-{chosen.get('shards', '')}"
            parameters: dict[str, Any] = {
                "recipe": source,
                "overrides": [*request.overrides, *own],
                "store": store,
                **chosen,
            }
            return run_deployment(
                self.pool.deployment.id,
                parameters=parameters,
                timeout=0,
                flow_run_name=name,
                idempotency_key=key,
                tags=["deepspec", GROUP],
            )

    def _follow(self, child: FlowRun, lane: Lane) -> FlowRun:
        """The child as it was when it had ended.

        Raises:
            TransientError: it took too long, gave no sign of life, or is gone.
            Stopped: the stage was left.
        """
        limit, began = self.run.limits.deadline_s, None
        while True:
            try:
                now = self._patiently(lambda: self._read(child))
            except ObjectNotFound:
                raise TransientError(
                    "its run was deleted", where=child.name, fix="it is tried again by itself"
                ) from None
            state = now.state
            if state is not None and state.is_final():
                return now
            if state is not None and (state.is_scheduled() or state.is_pending()):
                self.waiting.add(lane.name)
            else:
                self.waiting.discard(lane.name)
                began = began or time.monotonic()
            if str(child.id) in self.silent:
                self._patiently(
                    lambda: self._set(
                        child,
                        Crashed(
                            message="no sign of life in the store: its process or machine is gone"
                        ),
                    )
                )
                raise TransientError(
                    "it gave no sign of life any more",
                    where=child.name,
                    fix="it is tried again by itself",
                )
            if began and limit and time.monotonic() - began > limit + START_S:
                raise TransientError(
                    f"it did not finish in {limit + START_S:g} s",
                    where=child.name,
                    fix="it is tried again by itself",
                )
            self._pause(POLL_S)

    def _until_quiet(self, child: FlowRun) -> None:
        """Return when it works on nothing: cut off from the server or being ended it may do so
        for a while, and nothing is made twice.
        """
        while str(child.id) in self.alive:
            self._pause(POLL_S)

    def _judge(self, child: FlowRun, shards: Sequence[int], before: dict[int, float]) -> None:
        """Return if everything is there.

        Raises:
            DeepSpecError: why it is not, as far as the child left word in the store or in its
                state.
        """
        state = child.state
        missing = self.run.missing(shards) if self.run.sharded else []
        if not missing and (self.run.sharded or (state is not None and state.is_completed())):
            return
        told = f"run {child.name!r} ended {state.name if state else ''}: {state.message if state else ''}".strip(
            ": "
        )
        if state is not None and state.is_completed():
            what = f"{told}; but of its shards {shard_list(missing)} are not there"
            fix = "the workers must read the same run file, and reach the same store under its name; it is tried again by itself"
            raise TransientError(what, where=self.artifact.url, fix=fix)
        if state is None or not state.is_failed() or state.is_crashed():
            raise TransientError(told, where=child.name, fix="it is tried again by itself")
        after = noted_failures(self.artifact)
        # units of an evaluation are known to its child alone
        asked = missing if self.run.sharded else after
        failures = read_failures(
            self.artifact,
            [shard for shard in asked if after.get(shard) not in (None, before.get(shard))],
        )
        if failures:
            rest = {
                shard: {"what": told, "transient": True}
                for shard in missing
                if shard not in failures
            }
            raise ShardsFailed(told, where=self.artifact.url, failures={**failures, **rest})
        raise error_in(state.message or "", told, child.name)

    def _look(self) -> None:
        """Until the stage is left: more lanes for workers that came, children that fell silent,
        shards that were committed.
        """
        watch = StoreWatch(self.artifact, self.run.before, self.run.progress)
        while not self.run.left.wait(watch.pause_s):
            try:
                watch.poll()
                seen = self.leases.others()
                self.alive = {one.lease.run_id for one in seen if one.alive}
                self.silent = {one.lease.run_id for one in seen} - self.alive
                self._add_lanes()
                self.pool.warn_if_deserted(waiting=bool(self.waiting))
            except (DeepSpecError, OSError, httpx.HTTPError, PrefectException) as error:
                # the next look may do better
                get_run_logger().debug("looking for progress: %s", error)

    def _add_lanes(self) -> None:
        wanted = self.fixed or self.pool.room()
        self.lanes += [Lane(f"worker #{number}") for number in range(len(self.lanes), wanted)]

    def _read(self, child: FlowRun) -> FlowRun:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(child.id)

    def _set(self, child: FlowRun, state: Any) -> None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(child.id, state)

    def _cancel_left(self) -> None:
        """What an earlier try of this run asked for and no worker has begun would be done
        beside what is dealt now.
        """
        parent, waits = (
            FlowRunFilterParentFlowRunId(any_=[UUID(flow_run.id)]),
            [StateType.SCHEDULED, StateType.PENDING],
        )
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=waits))
        with get_client(sync_client=True) as client:
            for child in client.read_flow_runs(
                flow_run_filter=FlowRunFilter(parent_flow_run_id=parent, state=state)
            ):
                if GROUP in child.tags:
                    client.set_flow_run_state(child.id, Cancelling())

    def _cancel(self, child: FlowRun) -> None:
        """Its worker ends it; if the server cannot be told, its own deadlines and leases are
        what is left.
        """
        try:
            self._set(child, Cancelling())
        except (httpx.HTTPError, ObjectNotFound) as error:
            get_run_logger().warning("run %r was not cancelled: %s", child.name, error)

    def _pause(self, seconds: float) -> None:
        if self.run.left.wait(seconds):
            raise Stopped("the child run was ended with its run")

    def _patiently(self, call: Callable[[], T]) -> T:
        """What the server answers, which may be away for a while: nothing is lost by waiting for
        it.

        Raises:
            ConfigError: it refuses the request itself.
            Stopped: the stage was left meanwhile.
        """
        while True:
            try:
                return call()
            except httpx.HTTPStatusError as error:
                if error.response.is_client_error:
                    what, where = (
                        f"Prefect refuses the child run: {error}",
                        f"deployment {self.title}",
                    )
                    raise ConfigError(
                        what, where=where, fix="run `python -m flows.setup` again"
                    ) from None
                get_run_logger().warning("the Prefect server: %s", error)
            except httpx.HTTPError as error:
                get_run_logger().warning("the Prefect server is away: %s", error)
            self._pause(2 * POLL_S)


def error_in(message: str, told: str, where: str) -> DeepSpecError:
    """The error with which a flow run failed, as its own class; a ChildFailed if the state's
    message names none.
    """
    name, _, text = message.partition("exception: ")[2].partition(": ")
    what, _, fix = text.partition("\n  fix: ")
    found = error_named(name, what.partition("\n")[0], where=where, fix=fix or "see its log")
    return (
        ChildFailed(told, where=where, fix="see its log")
        if isinstance(found, ShardsFailed) or not what
        else found
    )
