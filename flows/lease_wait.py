"""Two runs on the same artifact: each takes shards that the other does not work on, or waits
until it ends, and says so.
"""

from __future__ import annotations

import time

from prefect import get_run_logger
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.leases import LOST_S, Lease, Leases, holders_text, this_process
from deepspec.artifacts.run import Run
from deepspec.artifacts.stages import STAGES
from deepspec.artifacts.status import StageStatus
from deepspec.config.run import RunConfig
from deepspec.errors import TransientError
from flows.stage_progress import StageProgress
from flows.store_watch import StoreWatch

# tag of a run that another one deals its shards; a user's own flow may start any deployment, too
GROUP = "group"


def leases_on(artifact: Artifact) -> Leases:
    """The leases of the flow run on shards of the artifact, for a `with` block."""
    parent = str(flow_run.parent_flow_run_id or "") if is_part() else ""
    return Leases(
        artifact,
        Lease(
            run=flow_run.name or "",
            run_id=str(flow_run.id or ""),
            parent_run_id=parent,
            process=this_process(),
        ),
    )


def shards_to_lease(todo: StageStatus) -> list[int]:
    """The missing shards; a stage without shards is leased as one."""
    return todo.missing if STAGES[todo.stage].is_sharded and todo.missing else [0]


def acquire_shards(leases: Leases, config: RunConfig, todo: StageStatus) -> tuple[list[int], bool]:
    """Those of the missing shards that nobody else works on, once there are any, and whether that
    was so at once.

    Raises:
        TransientError: there are none, and a run that has a worker only for the time of its shards
            is not to keep it waiting.
    """
    wanted = shards_to_lease(todo)
    mine, others = leases.acquire(wanted)
    if len(mine) == len(wanted):
        return mine, True
    logger, told = get_run_logger(), holders_text(others)
    if mine:
        logger.warning(
            "%s: %d of %d missing shards are left to %s",
            todo.stage,
            len(wanted) - len(mine),
            len(wanted),
            told,
        )
        return mine, True
    if is_part():
        raise TransientError(
            f"another run works on these shards: {told}",
            where=todo.artifact_url,
            fix="it is tried again by itself",
        )
    logger.warning(
        "%s: waiting for %s; what is left is taken over when it ends, or %g s after it died",
        todo.stage,
        told,
        LOST_S,
    )
    progress = StageProgress(config.name, todo, sharded=STAGES[todo.stage].is_sharded)
    progress.set_note(f"waiting for {told}, which works on the same shards")
    watch = StoreWatch(Run(config).artifact(todo.stage), todo, progress)
    while not mine:
        time.sleep(watch.pause_s)
        try:
            watch.poll()
            mine = leases.acquire(wanted).shards
        except (TransientError, OSError) as error:
            # hours of waiting are not given up because the store is away for a minute
            logger.warning("%s: still waiting: %s", todo.stage, error)
    progress.end_waiting()
    logger.info("%s: going on", todo.stage)
    return mine, False


def is_part() -> bool:
    """Whether another flow dealt this run its shards."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run is not None and GROUP in run.tags and run.parent_task_run_id is not None
