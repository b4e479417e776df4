"""The executor of a Ray cluster: each group of shards is a Prefect task in a Ray worker, which runs
the child that any machine runs.

Ray decides on which node, pins the worker to its GPU, and tells of a worker or node that has died;
what it had goes back to the dealer. The child is guarded by its worker, so it ends with it, however
that ends. Nodes share the store and nothing else. Ray is imported late: where it is to listen it
reads from the environment when it is imported, and that depends on the run.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import PrefectException

from deepspec.artifacts.run import Run
from deepspec.config.recipes import load_run
from deepspec.config.resources import DevicesConfig, ResourcesConfig
from deepspec.errors import ConfigError, TransientError, UserError
from deepspec.process.events import silent
from deepspec.process.launch import GRACE_S, RunRequest, Stopped, current_scope, run_child
from flows.child_log import ChildLog
from flows.local_executor import api_key, log_path
from flows.shard_scheduler import Lane
from flows.stage_run import StageRun
from flows.store_watch import StoreWatch, watching_store

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner

LOOK_S = 0.5  # between two looks at whether the run is being ended
ANSWER_S = 10.0
OBJECTS_BYTES = 100_000_000  # Ray's shared memory: nothing but names goes through it
# Ray's own switch for machines where it is to stay on loopback; and only who knows its token may
# use it.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


class GroupOrder(NamedTuple):
    """What a Ray worker must know beside the shards."""

    request: RunRequest
    stage: str
    fingerprint: str
    folder: str
    """Where the flow runs: relative paths of a run mean the same there, where there is such a
    folder.
    """


class RayExecutor:
    """Workers of a Ray cluster: one at a time per GPU, or as many as `resources.devices.lanes` says."""

    def __init__(self, run: StageRun, runner: RayTaskRunner[Any]) -> None:
        settings, self.runner = run.config.resources, runner
        gpus = num_gpus(settings.devices)
        count = settings.devices.lanes or max(1, gpus)
        self.lanes = [Lane(f"Ray #{number}") for number in range(count)]
        self.options: dict[str, Any] = (
            {"num_gpus": 1 / -(-count // gpus)} if gpus else {"num_cpus": 1}
        )
        artifact = Run(run.config).artifact(run.stage)
        self.order, self.url = (
            GroupOrder(run.request, run.stage, artifact.key.fingerprint, str(Path.cwd())),
            artifact.url,
        )
        # Ray tasks are begun in the flow's context: that of the lane's own task holds threads and
        # locks, which do not travel.
        self.context = copy_context()

    def work(self, lane: Lane, name: str, shards: list[int] | None) -> None:
        ray, owner = imported_ray(), current_scope()
        future = self.context.copy().run(self.begin, name, shards)
        while not ray.wait([future.wrapped_future], timeout=LOOK_S)[0]:
            if owner.closed:
                end_work(future.wrapped_future)
                raise Stopped(f"{name} was ended with its run")
        try:
            future.result()
        except ModuleNotFoundError as error:
            fix = "install the same version of deepspec, with the extra `ray`, on every node"
            raise ConfigError(
                f"a Ray worker cannot do {name}: {error}",
                where="resources.runner.ray_address",
                fix=fix,
            ) from None
        except (ray.exceptions.RayError, PrefectException, OSError) as error:
            what = f"the Ray worker that did {name} is gone: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            raise TransientError(
                what, where=self.url, fix="its shards are given out again by themselves"
            ) from None

    def begin(self, name: str, shards: list[int] | None) -> Any:
        from prefect_ray.context import remote_options

        # What a dead worker had is the dealer's to give out again, not Ray's.
        with remote_options(**self.options, max_retries=0):
            return self.runner.submit(
                work_there.with_options(task_run_name=f"{name} on Ray"),
                {"name": name, "order": self.order, "shards": shards},
            )


@task(name="shards on Ray", persist_result=False, cache_policy=NO_CACHE)
def work_there(name: str, order: GroupOrder, shards: list[int] | None) -> None:
    """In a Ray worker: the group's guarded child, with the GPU that Ray has set, and the servers'
    key if a block holds it.

    Raises:
        ConfigError: this node reads another run file than the flow did.
        DeepSpecError: the child's own error.
    """
    request, stage = order.request, order.stage
    with (
        contextlib.chdir(order.folder) if Path(order.folder).is_dir() else contextlib.nullcontext()
    ):
        config = load_run(request.source, request.overrides, store=request.store)
        artifact = Run(config).artifact(stage)
        if artifact.key.fingerprint != order.fingerprint:
            what = f"{request.source} on the Ray node {socket.gethostname()} is not what the flow has read"
            raise ConfigError(
                what,
                where=artifact.url,
                fix="a run's files must be the same, under the same path, on every node",
            )
        path = log_path(artifact, name)
        get_run_logger().info("%s: started on %s, full log in %s", name, socket.gethostname(), path)
        env = {"DEEPSPEC_EVENTS": "1", **(api_key(config) if stage == "answers" else {})}
        command, deadline_s = (
            request.command(stage, shards),
            config.resources.retries.limits(stage).deadline_s,
        )
        with contextlib.closing(ChildLog(path)) as forward:
            run_child(
                command,
                on_event=silent,
                on_line=forward,
                env=env,
                log_path=path,
                timeout_s=deadline_s,
            )


@contextlib.contextmanager
def ray_executor(run: StageRun) -> Iterator[RayExecutor]:
    """Executor on the cluster of `resources.runner.ray_address`; progress is what appears in the store.

    Raises:
        UserError: there is no such cluster, or it has nothing to work with.
    """
    artifact = Run(run.config).artifact(run.stage)
    with (
        connected(run.config.resources) as runner,
        watching_store(StoreWatch(artifact, run.before, run.progress)),
    ):
        yield RayExecutor(run, runner)


@contextlib.contextmanager
def connected(settings: ResourcesConfig) -> Iterator[RayTaskRunner[Any]]:
    """Prefect's task runner on the cluster that is meant, or on a Ray of this process's own, on
    loopback and without a dashboard.
    """
    address = settings.runner.ray_address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if address is None:
        os.environ.update({"RAY_AUTH_TOKEN": secrets.token_hex(32), **ON_LOOPBACK, **os.environ})
        options |= {
            "num_cpus": settings.devices.lanes,
            "include_dashboard": False,
            "object_store_memory": OBJECTS_BYTES,
        }
    with contextlib.ExitStack() as stack:
        try:
            if address is not None:
                check_answers(address)
            from prefect_ray import RayTaskRunner

            with keeping_sigterm():
                runner = stack.enter_context(RayTaskRunner(address or "local", options))
        except (OSError, RuntimeError, ValueError) as error:
            what = f"Ray cannot be {'reached' if address else 'started'}: {error}"
            fix = "resources.runner.ray_address is HOST:PORT on a machine of the cluster (`ray status` tells), ray://HOST:10001 from elsewhere"
            raise UserError(what, where=address or "a Ray of this machine", fix=fix) from None
        yield runner


def check_answers(address: str) -> None:
    """Ray itself would try for minutes to reach a cluster that is not there.

    Raises:
        OSError, ValueError: nothing listens there, or it is no HOST:PORT.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        raise ValueError(f"{address!r} names no host and port")
    socket.create_connection((parts.hostname, parts.port), ANSWER_S).close()


@contextlib.contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Ray's handler would end the process at once; the one that was there lets the flow end in
    order.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def num_gpus(devices: DevicesConfig) -> int:
    """GPUs of the cluster that the stage may use; where there are none it runs on CPUs.

    Raises:
        ConfigError: there are none, and it must not.
    """
    found = int(imported_ray().cluster_resources().get("GPU", 0)) if devices.type != "cpu" else 0
    if not found and devices.type == "cuda":
        fix = "set resources.devices.type to auto, or add a node with GPUs"
        raise ConfigError("the Ray cluster has no GPU", where="resources.devices.type", fix=fix)
    return found


def end_work(work: Any) -> None:
    """The group's child is ended by its worker; a worker that does not do so in time is ended
    itself, and the child's guard sees it.
    """
    ray = imported_ray()
    for force in (False, True):
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(work, force=force)
            if ray.wait([work], timeout=GRACE_S + 1)[0]:
                return


def imported_ray() -> Any:
    """Ray, which `connected` has imported."""
    import ray

    return ray
