"""The executor of a Ray cluster: each group of shards is a Prefect task in a Ray worker, which runs
the child that any machine runs.

Ray decides on which node, pins the worker to its GPU, and reports a worker or node that has died;
its shards go back to the scheduler. The child is supervised by its worker, so it ends with it,
however that ends. Nodes share the store and nothing else.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import PrefectException

from deepspec.artifacts.run import open_run
from deepspec.errors import ConfigError, TransientError
from deepspec.process.events import silent
from deepspec.process.launch import RunRequest, run_child
from deepspec.process.scopes import Stopped, current_scope, scope
from flows.child_log import ChildLog
from flows.local_executor import log_path, server_key
from flows.ray_cluster import connected, end_work, imported_ray, num_gpus
from flows.shard_scheduler import Lane
from flows.stage_run import StageRun
from flows.store_watch import StoreWatch, watching_store

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner

LOOK_S = 0.5  # between two looks at whether the run is being ended


class GroupOrder(NamedTuple):
    """What a Ray worker must know in addition to the shards."""

    request: RunRequest
    stage: str
    fingerprint: str
    folder: str
    """Where the flow runs: relative paths of a run mean the same on a node that has it, too."""


class RayExecutor:
    """Workers of a Ray cluster: one at a time for each GPU (or `gpus_per_lane` of them), or as many
    as `resources.devices.lanes` sets.
    """

    def __init__(self, stage_run: StageRun, runner: RayTaskRunner[Any]) -> None:
        devices, artifact = stage_run.run.config.resources.devices, stage_run.artifact
        self.runner = runner
        groups = num_gpus(devices) // devices.gpus_per_lane
        count = devices.lanes or max(1, groups)
        self.lanes = [Lane(f"Ray #{number}") for number in range(count)]
        self.options: dict[str, Any] = {"num_cpus": 1}
        if groups:
            # Lanes share one GPU, and not several: Ray gives a part of one only.
            sharing = -(-count // groups) if devices.gpus_per_lane == 1 else 1
            self.options = {"num_gpus": devices.gpus_per_lane / sharing}
        fingerprint, folder = artifact.key.fingerprint, str(Path.cwd())
        self.order = GroupOrder(stage_run.request, stage_run.stage, fingerprint, folder)
        self.url = artifact.url
        # Ray tasks are begun in the flow's context: that of the lane's own task holds threads and
        # locks, which do not travel.
        self.context = copy_context()

    def work(self, lane: Lane, name: str, shards: list[int] | None) -> None:
        """As `Executor` has it."""
        ray, owner = imported_ray(), current_scope()
        future = self.context.copy().run(self._begin, name, shards)
        while not ray.wait([future.wrapped_future], timeout=LOOK_S)[0]:
            if owner.closed:
                end_work(future.wrapped_future, owner.patience_s)
                raise Stopped(f"{name} was ended with its run")
        try:
            future.result()
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"a Ray worker cannot do {name}: {error}",
                where="resources.runner.ray_address",
                fix="install the same version of deepspec, with the extra `ray`, on every node",
            ) from None
        except (ray.exceptions.RayError, PrefectException, OSError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise TransientError(
                f"the Ray worker that did {name} is gone: {reason}",
                where=self.url,
                fix="its shards are assigned again by themselves",
            ) from None

    def _begin(self, name: str, shards: list[int] | None) -> Any:
        from prefect_ray.context import remote_options

        # What a dead worker had is assigned again by the scheduler, not by Ray.
        with remote_options(**self.options, max_retries=0):
            return self.runner.submit(
                work_on_node.with_options(task_run_name=f"{name} on Ray"),
                {"name": name, "order": self.order, "shards": shards},
            )


@task(name="shards on Ray", persist_result=False, cache_policy=NO_CACHE)
def work_on_node(name: str, order: GroupOrder, shards: list[int] | None) -> None:
    """In a Ray worker: the group's supervised child, with the GPU that Ray has set, and the
    servers' key if a block holds it.

    Raises:
        ConfigError: this node reads another run file than the flow did.
        DeepSpecError: the child's own error.
    """
    request, stage, host = order.request, order.stage, socket.gethostname()
    has_folder = Path(order.folder).is_dir()
    with contextlib.chdir(order.folder) if has_folder else contextlib.nullcontext():
        run = open_run(request.source, request.overrides, store=request.store)
        artifact, resources = run.artifact(stage), run.config.resources
        if artifact.key.fingerprint != order.fingerprint:
            raise ConfigError(
                f"{request.source} on the Ray node {host} differs from what the flow has read",
                where=artifact.url,
                fix="a run's files must be the same, under the same path, on every node",
            )
        path = log_path(artifact, name)
        get_run_logger().info("%s: started on %s, full log in %s", name, host, path)
        secrets = server_key(run.config, stage)
        with contextlib.closing(ChildLog(path)) as child_log, scope(resources.runner.patience_s):
            run_child(
                request.command(stage, shards),
                on_event=silent,
                on_line=child_log,
                env={"DEEPSPEC_EVENTS": "1", **secrets},
                log_path=path,
                timeout_s=resources.retries.limits(stage).deadline_s,
            )


@contextlib.contextmanager
def ray_executor(stage_run: StageRun) -> Iterator[RayExecutor]:
    """An executor on the cluster of `resources.runner.ray_address`; progress is what appears in the
    store.

    Raises:
        UserError: there is no such cluster, or it has nothing to work with.
    """
    watch = StoreWatch(stage_run.artifact, stage_run.before, stage_run.progress)
    with connected(stage_run.run.config.resources) as runner, watching_store(watch):
        yield RayExecutor(stage_run, runner)
