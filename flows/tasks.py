"""The stages of a run, one after the other: what is missing of each is made, and the artifact
sealed if it is whole.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from prefect import get_run_logger

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.leases import Leases
from deepspec.artifacts.missing import require_sealed
from deepspec.artifacts.run import Run
from deepspec.artifacts.stages import STAGES
from deepspec.artifacts.status import StageStatus, selected, stage_status
from deepspec.config.run import RunConfig
from deepspec.errors import DeepSpecError
from deepspec.process.launch import RunRequest
from deepspec.process.progress_display import State
from deepspec.process.shard_ranges import parse_shards
from flows.assets import publish_asset, publish_once
from flows.compatible import check_server
from flows.failures import publish_failure
from flows.lease_wait import acquire_shards, leases_on, shards_to_lease
from flows.local_executor import LocalExecutor
from flows.pool_executor import PoolExecutor
from flows.reporting import StageOutcome, publish_stages, report_nothing_to_do
from flows.request import open_run
from flows.stage_run import Executor, StageRun


def run_stages(
    request: RunRequest, chosen: Sequence[str], shards: str | int = ""
) -> list[StageOutcome]:
    """Those of the chosen stages that the run has, in order, each sealed; the first that fails ends
    the run.

    With `shards` only these are made, and the stages after one that is not whole by then are left
    for another run.

    Raises:
        DeepSpecError: the request is wrong (before any work), or a stage failed.
    """
    check_server()
    asked, config = parse_shards(str(shards)), open_run(request)
    outcomes: list[StageOutcome] = []
    for stage in (
        stage for stage in (known.name for known in Run(config).stages) if stage in chosen
    ):
        if asked and outcomes and not outcomes[-1].status.sealed:
            get_run_logger().warning(
                "%s: left out, because shards of %s are still missing",
                stage,
                outcomes[-1].status.stage,
            )
            break
        started = time.monotonic()
        try:
            outcomes.append(run_stage(request, config, stage, asked))
        except DeepSpecError as error:
            publish_failure(config.name, error, request, stage)
            publish_stages(
                config.name,
                [
                    *outcomes,
                    StageOutcome(
                        stage_status(Run(config), stage), "failed", time.monotonic() - started
                    ),
                ],
            )
            raise
    publish_stages(config.name, outcomes)
    return outcomes


def run_stage(
    request: RunRequest, config: RunConfig, stage: str, asked: Sequence[int] = ()
) -> StageOutcome:
    """The stage, with whatever was missing of it (or of the asked shards) made, and the artifact
    sealed if it is whole.

    Raises:
        ShardsFailed: shards are still missing; all others are committed.
        DeepSpecError: the stage could not be run at all.
    """
    started, status = time.monotonic(), stage_status(Run(config), stage)
    todo = selected(Run(config), status, asked)
    if nothing_to_do(status, todo, asked):
        return already_done(config, status, 0.0)
    require_sealed(Run(config), stage)
    artifact = Run(config).artifact(stage)
    with leases_on(artifact) as leases:
        while True:
            mine, at_once = acquire_shards(leases, config, todo)
            if not at_once or made_since(artifact, mine):
                status = stage_status(Run(config), stage)
                todo = selected(Run(config), status, asked)
                if nothing_to_do(status, todo, asked):
                    return already_done(config, status, time.monotonic() - started)
            part = among(todo, mine)
            if part.missing or not todo.missing:
                # none missing: the manifest alone is
                run = StageRun(request, config, part, some=bool(asked and part.missing))
                status = work_off(run, leases, asked)
                todo = selected(Run(config), status, asked)
                if status.sealed:
                    publish_asset(artifact)
                if nothing_to_do(status, todo, asked):
                    return StageOutcome(status, "done", time.monotonic() - started)
            leases.release()


def work_off(run: StageRun, leases: Leases, asked: Sequence[int]) -> StageStatus:
    """The stage as it is once this run's part of what was missing is made.

    Raises:
        DeepSpecError: some of that part is still missing.
    """
    try:
        with executor_for(run, leases) as executor:
            run.work(executor)
        after = stage_status(Run(run.config), run.stage)
        left = among(selected(Run(run.config), after, asked), shards_to_lease(run.before))
    except DeepSpecError:
        run.progress.close("failed")
        raise
    failed = bool(left.missing) or not (run.before.missing or after.sealed)
    run.progress.close("failed" if failed else "done")
    if failed:
        raise run.failure(left).with_traceback(None)
    return after


def nothing_to_do(status: StageStatus, todo: StageStatus, asked: Sequence[int]) -> bool:
    return (
        status.sealed or status.in_training or bool(asked and status.missing and not todo.missing)
    )


def made_since(artifact: Artifact, missing: Sequence[int]) -> bool:
    """Whether another run may have made some of what was missing; a stale record or manifest
    looks the same.
    """
    return artifact.manifest() is not None or bool(set(missing) & set(artifact.record_shards()))


def already_done(config: RunConfig, status: StageStatus, seconds: float) -> StageOutcome:
    state: State = "in training" if status.in_training else "already done"
    report_nothing_to_do(status, state)
    if status.sealed:
        publish_once(Run(config).artifact(status.stage))
    return StageOutcome(status, state, seconds)


def among(todo: StageStatus, shards: Sequence[int]) -> StageStatus:
    """The status with only these of the missing shards; a stage without shards is whole, or is
    not.
    """
    known = set(shards)
    return (
        todo._replace(missing=[shard for shard in todo.missing if shard in known])
        if STAGES[todo.stage].is_sharded
        else todo
    )


@contextlib.contextmanager
def executor_for(run: StageRun, leases: Leases) -> Iterator[Executor]:
    """Where the stage's work is done, as `resources.runner.kind` says; a Ray cluster takes stages
    with shards alone.
    """
    runner = run.config.resources.runner.kind
    if runner == "ray" and run.sharded:
        from flows.ray_executor import ray_executor

        with ray_executor(run) as executor:
            yield executor
    elif runner == "workers" and STAGES[run.stage].flow:
        yield PoolExecutor(run, leases)
    else:
        yield LocalExecutor(run)
