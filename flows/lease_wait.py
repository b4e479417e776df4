"""Two runs on the same artifact: each takes shards that the other does not work on, or waits until
it ends, and reports that it waits.
"""

import time
from typing import NamedTuple

from prefect import get_run_logger
from prefect.runtime import flow_run

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.leases import LOST_S, Lease, Leases, holders_text, this_process
from deepspec.artifacts.run import Run
from deepspec.artifacts.stages import STAGES
from deepspec.artifacts.status import StageStatus
from deepspec.errors import TransientError
from flows.child_runs import is_part
from flows.stage_progress import StageProgress
from flows.store_watch import StoreWatch


class AcquiredShards(NamedTuple):
    """The shards that this run works on now."""

    shards: list[int]
    waited: bool
    """Whether another run had all of them before."""


def leases_on(artifact: Artifact) -> Leases:
    """The leases of the flow run on shards of the artifact, for a `with` block."""
    lease = Lease(
        run=flow_run.name or "",
        run_id=str(flow_run.id or ""),
        parent_run_id=str(flow_run.parent_flow_run_id or "") if is_part() else "",
        process=this_process(),
    )
    return Leases(artifact, lease)


def shards_to_lease(todo: StageStatus) -> list[int]:
    """The missing shards; a stage without shards is leased as one."""
    return todo.missing if STAGES[todo.stage].is_sharded and todo.missing else [0]


def acquire_shards(leases: Leases, run: Run, todo: StageStatus) -> AcquiredShards:
    """Those of the missing shards that no other run works on, once there are any.

    Raises:
        TransientError: there are none, and this run is a child run, which is not to keep its worker
            waiting.
    """
    wanted = shards_to_lease(todo)
    mine, others = leases.acquire(wanted)
    if len(mine) == len(wanted):
        return AcquiredShards(mine, waited=False)
    holders = holders_text(others)
    if mine:
        get_run_logger().warning(
            "%s: %d of %d missing shards are left to %s",
            todo.stage,
            len(wanted) - len(mine),
            len(wanted),
            holders,
        )
        return AcquiredShards(mine, waited=False)
    if is_part():
        raise TransientError(
            f"another run works on these shards: {holders}",
            where=todo.artifact_url,
            fix="it is tried again by itself",
        )
    return AcquiredShards(_wait_for_shards(leases, run, todo, holders), waited=True)


def _wait_for_shards(leases: Leases, run: Run, todo: StageStatus, holders: str) -> list[int]:
    logger = get_run_logger()
    logger.warning(
        "%s: waiting for %s; what is left is taken over when it ends, or %g s after it died",
        todo.stage,
        holders,
        LOST_S,
    )
    progress = StageProgress(run.config.name, todo, sharded=STAGES[todo.stage].is_sharded)
    progress.set_note(f"waiting for {holders}, which works on the same shards")
    watch = StoreWatch(run.artifact(todo.stage), todo, progress)
    mine = list[int]()
    while not mine:
        time.sleep(watch.pause_s)
        try:
            watch.poll()
            mine = leases.acquire(shards_to_lease(todo)).shards
        except (TransientError, OSError) as error:
            # Hours of waiting are not given up because the store is away for a minute.
            logger.warning("%s: still waiting: %s", todo.stage, error)
    progress.end_waiting()
    logger.info("%s: going on", todo.stage)
    return mine
