"""A work pool as seen from a run that has its work done there: how much room it has, and whether
workers are online.
"""

import time

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from deepspec.errors import ConfigError
from flows.stage_progress import StageProgress

DESERTED_S = 60.0  # without a worker, before a warning


class WorkPool:
    """The pool of the deployment `title`, as `regenerate/gpu`.

    Raises:
        ConfigError: there is no such deployment, or its pool has no room for other runs than this
            one.
    """

    def __init__(self, title: str, progress: StageProgress) -> None:
        self.title, self.progress = title, progress
        self._deserted_since: float | None = None
        self._has_warned = False
        with get_client(sync_client=True) as client:
            try:
                self.deployment = client.read_deployment_by_name(title)
                self.name = str(self.deployment.work_pool_name)
                pool_limit = client.read_work_pool(self.name).concurrency_limit
            except ObjectNotFound:
                raise ConfigError(
                    f"there is no deployment {title!r} on the Prefect server",
                    where="resources.runner.workers",
                    fix="run `python -m flows.setup`, with PREFECT_API_URL set to the server of "
                    "the workers; or another name",
                ) from None
            own = client.read_flow_run(flow_run.root_flow_run_id)
        self.limit = self._smallest_limit(pool_limit, own)
        self._check_room(on_same_pool=own.work_pool_name == self.name)

    def _smallest_limit(self, pool_limit: int | None, own: FlowRun) -> int | None:
        """Runs of the deployment that may be under way at a time, by the pool's limit and by its
        own; this run waits for them and takes a place itself, where they count it.
        """
        limits = []
        if pool_limit is not None:
            limits.append(pool_limit - (own.work_pool_name == self.name))
        if own_limit := self.deployment.global_concurrency_limit:
            limits.append(own_limit.limit - (own.deployment_id == self.deployment.id))
        return min(limits, default=None)

    def _check_room(self, *, on_same_pool: bool) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"this run waits for runs of {self.title!r}, "
                "and itself holds the only place that they could have",
                where=f"work pool {self.name}",
                fix="start it on another pool (`pipeline/demo` is on deepspec-cpu), or by hand, "
                "or raise the limit",
            )
        if on_same_pool and self.limit is None:
            get_run_logger().warning(
                "this run is on the pool %r, too, and keeps one of its workers waiting: "
                "where that is the only one, nothing goes on. "
                "Start it on another pool, as `pipeline/demo` is",
                self.name,
            )

    def online(self) -> int:
        """Workers of the pool that are online."""
        with get_client(sync_client=True) as client:
            workers = client.read_workers_for_work_pool(self.name)
        return sum(worker.status == "ONLINE" for worker in workers)

    def room(self) -> int:
        """Groups that can be under way: one for each worker, within the limits; one that waits
        where there is no worker.
        """
        workers = max(1, self.online())
        return workers if self.limit is None else min(workers, self.limit)

    def warn_if_deserted(self, *, waiting: bool) -> None:
        """Warn once, in the log and as the stage's note, where runs are waiting and no worker has
        been online for a minute.
        """
        if not waiting or self.online():
            self._deserted_since = None
            if self._has_warned:
                self.progress.set_note("")
            self._has_warned = False
            return
        self._deserted_since = self._deserted_since or time.monotonic()
        if not self._has_warned and time.monotonic() - self._deserted_since >= DESERTED_S:
            self._has_warned = True
            start = f"`prefect worker start --pool {self.name}`"
            warning = f"no worker on the work pool {self.name!r}: start one with {start}"
            get_run_logger().warning(warning)
            self.progress.set_note(warning)
