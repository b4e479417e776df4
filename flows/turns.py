"""Two runs on the same artifact: each takes shards that the other does not work on, or waits until it ends, and says so."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prefect import get_run_logger
from prefect.context import FlowRunContext
from prefect.runtime import flow_run

from deepspec.artifact import Artifact
from deepspec.claims import LOST_S, Claim, Claims, this_process, words
from deepspec.config import RunConfig
from deepspec.errors import TransientError
from deepspec.lineage import artifact_of
from deepspec.stages import SHARDED, StageStatus
from flows.reporting import Board

LOOK_S = 3.0  # between two looks into the store
MOST_LOOKING = 0.05  # share of the time that is spent on it: a listing of 10,000 records takes a while


def claims_on(artifact: Artifact) -> Claims:
    """The claims of the flow run on shards of the artifact, for a `with` block."""
    run_id, family = str(flow_run.id or ""), str(flow_run.root_flow_run_id or this_process())
    return Claims(artifact, Claim(run=flow_run.name or "", run_id=run_id, family=family, process=this_process()))


def to_claim(todo: StageStatus) -> list[int]:
    """The missing shards; a stage without shards is claimed as one."""
    return todo.missing if todo.stage in SHARDED and todo.missing else [0]


def take_turn(claims: Claims, config: RunConfig, todo: StageStatus) -> tuple[list[int], bool]:
    """Those of the missing shards that nobody else works on, once there are any, and whether that was so at once.

    Raises:
        TransientError: there are none, and a run that has a worker only for the time of its shards is not to keep it waiting.
    """
    wanted = to_claim(todo)
    mine, others = claims.take(wanted)
    if len(mine) == len(wanted):
        return mine, True
    logger, told = get_run_logger(), words(others)
    if mine:
        logger.warning("%s: %d of %d missing shards are left to %s", todo.stage, len(wanted) - len(mine), len(wanted), told)
        return mine, True
    if is_part():
        raise TransientError(f"another run works on these shards: {told}", where=todo.artifact_url, fix="it is tried again by itself")
    logger.warning("%s: waiting for %s; what is left is taken over when it ends, or %g s after it died", todo.stage, told, LOST_S)
    board = Board(config.name, todo, sharded=todo.stage in SHARDED)
    board.say(f"waiting for {told}, which works on the same shards")
    watch = Watch(artifact_of(config, todo.stage), todo, board)
    while not mine:
        time.sleep(watch.pause_s)
        watch.look()
        mine = claims.take(wanted).shards
    logger.info("%s: going on", todo.stage)
    return mine, False


def is_part() -> bool:
    """Whether another flow dealt this run its shards."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run is not None and run.deployment_id is not None and run.parent_task_run_id is not None


class Watch:
    """Tells a board of the shards that others commit: a listing of names at each look, and each new record read once."""

    def __init__(self, artifact: Artifact, todo: StageStatus, board: Board) -> None:
        self.artifact, self.board, self.took_s = artifact, board, 0.0
        # The stale record of a shard that is made again is there already: that one is seen at the end.
        self.left = set(todo.missing) - set(artifact.record_shards()) if todo.stage in SHARDED else set[int]()

    def look(self) -> None:
        """May raise what the store raises."""
        if not self.left:
            return
        started = time.monotonic()
        new = sorted(self.left & set(self.artifact.record_shards()))
        self._tell(new)
        self.left -= set(new)
        self.took_s = time.monotonic() - started

    def _tell(self, shards: Sequence[int]) -> None:
        for record in self.artifact.read_records(shards).values():
            fields = record.model_dump(include={"shard", "rows", "tokens", "num_bytes", "seconds", "rejected"})
            self.board.hear({"event": "shard", "stage": self.artifact.key.stage, **fields})

    @property
    def pause_s(self) -> float:
        return max(LOOK_S, self.took_s / MOST_LOOKING)
