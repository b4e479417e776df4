"""Two runs on the same artifact: each takes shards that the other does not work on, or waits until it ends, and says so."""

from __future__ import annotations

import time
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from deepspec.artifact import Artifact
from deepspec.claims import LOST_S, Claim, Claims, this_process, words
from deepspec.config import RunConfig
from deepspec.errors import TransientError
from deepspec.lineage import artifact_of
from deepspec.stages import SHARDED, StageStatus
from flows.board import Board
from flows.store_watch import Watch

GROUP = "group"  # tag of the runs among which another one deals its shards out


def claims_on(artifact: Artifact) -> Claims:
    """The claims of the flow run on shards of the artifact, for a `with` block."""
    run_id = str(flow_run.id or "")
    return Claims(artifact, Claim(run=flow_run.name or "", run_id=run_id, family=family_of(run_id), process=this_process()))


def family_of(run_id: str) -> str:
    """Who deals the shards out: the run itself, or the one that dealt it its shards, each time that it is run.

    The runs that a try of a run has left behind on other machines work on; its next try must not have their shards made again.
    """
    if is_part():
        with get_client(sync_client=True) as client:
            dealer = client.read_flow_run(UUID(flow_run.parent_flow_run_id))
        return f"{dealer.id} {dealer.run_count}"
    return f"{run_id} {flow_run.run_count}" if run_id else this_process()


def to_claim(todo: StageStatus) -> list[int]:
    """The missing shards; a stage without shards is claimed as one."""
    return todo.missing if todo.stage in SHARDED and todo.missing else [0]


def take_turn(claims: Claims, config: RunConfig, todo: StageStatus) -> tuple[list[int], Board | None]:
    """Those of the missing shards that nobody else works on, once there are any, and what showed the waiting if there was any.

    Raises:
        TransientError: there are none, and a run that has a worker only for the time of its shards is not to keep it waiting.
    """
    wanted = to_claim(todo)
    mine, others = claims.take(wanted)
    if len(mine) == len(wanted):
        return mine, None
    logger, told = get_run_logger(), words(others)
    if mine:
        logger.warning("%s: %d of %d missing shards are left to %s", todo.stage, len(wanted) - len(mine), len(wanted), told)
        return mine, None
    if is_part():
        raise TransientError(f"another run works on these shards: {told}", where=todo.artifact_url, fix="it is tried again by itself")
    logger.warning("%s: waiting for %s; what is left is taken over when it ends, or %g s after it died", todo.stage, told, LOST_S)
    board = Board(config.name, todo, sharded=todo.stage in SHARDED)
    board.say(f"waiting for {told}, which works on the same shards")
    watch = Watch(artifact_of(config, todo.stage), todo, board)
    while not mine:
        time.sleep(watch.pause_s)
        try:
            watch.look()
            mine = claims.take(wanted).shards
        except (TransientError, OSError) as error:  # hours of waiting are not given up because the store is away for a minute
            logger.warning("%s: still waiting: %s", todo.stage, error)
    logger.info("%s: going on", todo.stage)
    return mine, board


def is_part() -> bool:
    """Whether another flow dealt this run its shards."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run is not None and run.parent_task_run_id is not None and GROUP in run.tags
