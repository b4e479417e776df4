"""A work pool as seen from a run that has its work done there: how much room it has, and
whether anybody works on it.
"""

from __future__ import annotations

import time
from typing import Any

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from deepspec.errors import ConfigError
from flows.stage_progress import StageProgress

DESERTED_S = 60.0  # without a worker, after which it is said


class WorkPool:
    """The pool of the deployment `title`, which must exist, and must have room beside the run that
    asks.

    Raises:
        ConfigError: it does not, or has not.
    """

    def __init__(self, title: str, progress: StageProgress) -> None:
        self.title, self.progress = title, progress
        self._deserted: float | None = None
        self._told = False
        with get_client(sync_client=True) as client:
            try:
                self.deployment = client.read_deployment_by_name(title)
                self.name = str(self.deployment.work_pool_name)
                limit = client.read_work_pool(self.name).concurrency_limit
            except ObjectNotFound:
                fix = "run `python -m flows.setup`, with PREFECT_API_URL set to the server that the workers ask; or another name"
                raise ConfigError(
                    f"there is no deployment {title!r} on the Prefect server",
                    where="resources.runner.workers",
                    fix=fix,
                ) from None
            own = client.read_flow_run(flow_run.root_flow_run_id)
        # the run that waits takes a place of the pool itself
        self._beside_us = own.work_pool_name == self.name
        self.limit = self._smallest(limit, own)
        if self.limit is not None and self.limit < 1:
            what = f"this run waits for runs of {title!r}, and itself holds the only place that they could have"
            fix = "start it on another pool (`pipeline/demo` is on deepspec-cpu), or by hand, or raise the limit"
            raise ConfigError(what, where=f"work pool {self.name}", fix=fix)
        if self._beside_us and self.limit is None:
            get_run_logger().warning(
                "this run is on the pool %r, too, and keeps one of its workers waiting: where that is the only one, nothing goes on. "
                "Start it on another pool, as `pipeline/demo` is",
                self.name,
            )

    def _smallest(self, pool_limit: int | None, own: Any) -> int | None:
        """Runs of the deployment that may be under way at a time, as the pool's limit and its
        own allow.
        """
        limit = self.deployment.global_concurrency_limit
        own_limit = limit.limit - (own.deployment_id == self.deployment.id) if limit else None
        limits = [pool_limit - self._beside_us if pool_limit is not None else None, own_limit]
        return min((limit for limit in limits if limit is not None), default=None)

    def online(self) -> int:
        with get_client(sync_client=True) as client:
            workers = client.read_workers_for_work_pool(self.name)
        return sum(worker.status == "ONLINE" for worker in workers)

    def room(self) -> int:
        """Groups that can be under way: one per worker, within the limits; one that waits where
        there is no worker.
        """
        workers = max(1, self.online())
        return workers if self.limit is None else min(workers, self.limit)

    def warn_if_deserted(self, *, waiting: bool) -> None:
        """Say it once, in the log and beside the progress, where runs wait and no worker has
        been there for a minute.
        """
        if not waiting or self.online():
            self._deserted = None
            if self._told:
                self.progress.set_note("")
            self._told = False
            return
        self._deserted = self._deserted or time.monotonic()
        if not self._told and time.monotonic() - self._deserted >= DESERTED_S:
            self._told = True
            told = nobody_on(self.name)
            get_run_logger().warning(told)
            self.progress.set_note(told)


def nobody_on(pool: str) -> str:
    return (
        f"no worker on the work pool {pool!r}: start one with `prefect worker start --pool {pool}`"
    )
