"""Two runs on the same artifact: each takes shards that the other does not work on, or waits
until it ends, and says so.
"""

from __future__ import annotations

import time

from prefect import get_run_logger
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.leases import LOST_S, Claim, Claims, this_process, words
from deepspec.artifacts.lineage import artifact_of
from deepspec.artifacts.status import SHARDED, StageStatus
from deepspec.config.run import RunConfig
from deepspec.errors import TransientError
from flows.stage_progress import Board
from flows.store_watch import Watch

# tag of a run that another one deals its shards; a user's own flow may start any deployment, too
GROUP = "group"


def claims_on(artifact: Artifact) -> Claims:
    """The claims of the flow run on shards of the artifact, for a `with` block."""
    dealer = str(flow_run.parent_flow_run_id or "") if is_part() else ""
    return Claims(
        artifact,
        Claim(
            run=flow_run.name or "",
            run_id=str(flow_run.id or ""),
            dealer=dealer,
            process=this_process(),
        ),
    )


def to_claim(todo: StageStatus) -> list[int]:
    """The missing shards; a stage without shards is claimed as one."""
    return todo.missing if todo.stage in SHARDED and todo.missing else [0]


def take_turn(claims: Claims, config: RunConfig, todo: StageStatus) -> tuple[list[int], bool]:
    """Those of the missing shards that nobody else works on, once there are any, and whether that
    was so at once.

    Raises:
        TransientError: there are none, and a run that has a worker only for the time of its shards
            is not to keep it waiting.
    """
    wanted = to_claim(todo)
    mine, others = claims.take(wanted)
    if len(mine) == len(wanted):
        return mine, True
    logger, told = get_run_logger(), words(others)
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
    board = Board(config.name, todo, sharded=todo.stage in SHARDED)
    board.say(f"waiting for {told}, which works on the same shards")
    watch = Watch(artifact_of(config, todo.stage), todo, board)
    while not mine:
        time.sleep(watch.pause_s)
        try:
            watch.look()
            mine = claims.take(wanted).shards
        except (TransientError, OSError) as error:
            # hours of waiting are not given up because the store is away for a minute
            logger.warning("%s: still waiting: %s", todo.stage, error)
    board.leave()
    logger.info("%s: going on", todo.stage)
    return mine, False


def is_part() -> bool:
    """Whether another flow dealt this run its shards."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run is not None and GROUP in run.tags and run.parent_task_run_id is not None
