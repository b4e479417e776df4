"""The stages of a run, one after the other: what is missing of each is made, and the artifact sealed if it is whole."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prefect import get_run_logger

from deepspec.artifact import Artifact
from deepspec.claims import Claims
from deepspec.config import RunConfig
from deepspec.errors import DeepSpecError
from deepspec.launch import Request
from deepspec.lineage import artifact_of
from deepspec.stages import SHARDED, StageStatus, parse_shards, require_sealed, stage_status, stages_of
from flows.assets import publish_asset
from flows.hands import LocalHands
from flows.reporting import StageOutcome, State, publish_failure, publish_stages, show_nothing_to_do
from flows.request import open_run
from flows.selection import selected
from flows.stage_run import Hands, StageRun
from flows.turns import claims_on, take_turn, to_claim
from flows.workers import FLOW_OF, WorkersHands


def run_stages(request: Request, chosen: Sequence[str], shards: str | int = "") -> list[StageOutcome]:
    """Those of the chosen stages that the run has, in order, each sealed; the first that fails ends the run.

    With `shards` only these are made, and the stages after one that is not whole by then are left for another run.

    Raises:
        DeepSpecError: the request is wrong (before any work), or a stage failed.
    """
    asked, config = parse_shards(str(shards)), open_run(request)
    outcomes: list[StageOutcome] = []
    for stage in (stage for stage in stages_of(config) if stage in chosen):
        if asked and outcomes and not outcomes[-1].status.sealed:
            get_run_logger().warning("%s: left out, because shards of %s are still missing", stage, outcomes[-1].status.stage)
            break
        try:
            outcomes.append(run_stage(request, config, stage, asked))
        except DeepSpecError as error:
            publish_failure(config.name, error)
            publish_stages(config.name, [*outcomes, StageOutcome(stage_status(config, stage), "failed", 0.0)])
            raise
    publish_stages(config.name, outcomes)
    return outcomes


def run_stage(request: Request, config: RunConfig, stage: str, asked: Sequence[int] = ()) -> StageOutcome:
    """The stage, with whatever was missing of it (or of the asked shards) made, and the artifact sealed if it is whole.

    Raises:
        ShardsFailed: shards are still missing; all others are committed.
        DeepSpecError: the stage could not be run at all.
    """
    started, status = time.monotonic(), stage_status(config, stage)
    todo = selected(config, status, asked)
    if nothing_to_do(todo, asked):
        return already_done(status, 0.0)
    require_sealed(config, stage)
    artifact = artifact_of(config, stage)
    with claims_on(artifact) as claims:
        while True:
            mine, at_once = take_turn(claims, config, todo)
            if not at_once or made_since(artifact, mine):
                status = stage_status(config, stage)
                todo = selected(config, status, asked)
                if nothing_to_do(todo, asked):
                    return already_done(status, time.monotonic() - started)
            part = among(todo, mine)
            if part.missing or not todo.missing:
                status = work_off(StageRun(request, config, part, some=bool(asked)), claims, asked)
                todo = selected(config, status, asked)
                if status.sealed:
                    publish_asset(artifact)
                if nothing_to_do(todo, asked):
                    return StageOutcome(status, "done", time.monotonic() - started)
            claims.release()


def work_off(run: StageRun, claims: Claims, asked: Sequence[int]) -> StageStatus:
    """The stage as it is once this run's part of what was missing is made.

    Raises:
        DeepSpecError: some of that part is still missing.
    """
    run.work(hands_for(run, claims))
    after = stage_status(run.config, run.stage)
    left = among(selected(run.config, after, asked), to_claim(run.before))
    failed = bool(left.missing) or not (run.before.missing or after.sealed)
    run.board.close("failed" if failed else "done")
    if failed:
        raise run.failure(left).with_traceback(None)
    return after


def nothing_to_do(todo: StageStatus, asked: Sequence[int]) -> bool:
    return todo.sealed or todo.in_training or (bool(asked) and not todo.missing)


def made_since(artifact: Artifact, missing: Sequence[int]) -> bool:
    """Whether another run may have made some of what was missing; a stale record or manifest looks the same."""
    return artifact.manifest() is not None or bool(set(missing) & set(artifact.record_shards()))


def already_done(status: StageStatus, seconds: float) -> StageOutcome:
    state: State = "in training" if status.in_training else "already done"
    show_nothing_to_do(status, state)
    return StageOutcome(status, state, seconds)


def among(todo: StageStatus, shards: Sequence[int]) -> StageStatus:
    """The status with only these of the missing shards; a stage without shards is whole, or is not."""
    known = set(shards)
    return todo._replace(missing=[shard for shard in todo.missing if shard in known]) if todo.stage in SHARDED else todo


def hands_for(run: StageRun, claims: Claims) -> Hands:
    """Where the stage's work is done, as `resources.runner` says."""
    if run.config.resources.runner == "workers" and run.stage in FLOW_OF:
        return WorkersHands(run, claims)
    return LocalHands(run)
