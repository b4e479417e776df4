"""The stages of a run, one after the other: what is missing of each is made, and the artifact
sealed if it is whole.
"""

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
from deepspec.errors import DeepSpecError
from deepspec.process.launch import RunRequest
from deepspec.process.progress_display import State
from deepspec.process.shard_ranges import parse_shards
from flows.assets import publish_asset, publish_once
from flows.child_runs import leaving_error_to_parent
from flows.compatible import check_server
from flows.failures import publish_failure
from flows.lanes import Executor, work_off
from flows.lease_wait import acquire_shards, leases_on, shards_to_lease
from flows.local_executor import LocalExecutor
from flows.pool_executor import PoolExecutor
from flows.reporting import StageOutcome, publish_stages, report_nothing_to_do
from flows.request import check_devices, checked_run
from flows.stage_run import StageRun


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
    outcomes = list[StageOutcome]()
    with leaving_error_to_parent():
        check_server()
        wanted, run = parse_shards(str(shards)), checked_run(request)
        stages = [stage.name for stage in run.stages if stage.name in chosen]
        check_devices(request, run, stages)
        for stage in stages:
            if wanted and outcomes and not outcomes[-1].status.sealed:
                get_run_logger().warning(
                    "%s: left out, because shards of %s are still missing",
                    stage,
                    outcomes[-1].status.stage,
                )
                break
            started = time.monotonic()
            try:
                outcomes.append(run_stage(request, run, stage, wanted))
            except DeepSpecError as error:
                publish_failure(run.config.name, error, request, stage)
                seconds = time.monotonic() - started
                failed = StageOutcome(stage_status(run, stage), "failed", seconds)
                publish_stages(run.config.name, [*outcomes, failed])
                raise
        publish_stages(run.config.name, outcomes)
    return outcomes


def run_stage(
    request: RunRequest, run: Run, stage: str, wanted: Sequence[int] = ()
) -> StageOutcome:
    """The stage, with everything made that was missing of it (or of the wanted shards), and the
    artifact sealed if it is whole.

    Raises:
        ShardsFailed: shards are still missing; all others are committed.
        DeepSpecError: the stage could not be run at all.
    """
    started = time.monotonic()
    status = stage_status(run, stage)
    todo = selected(run, status, wanted)
    if has_nothing_to_do(status, todo, wanted):
        return already_done(run, status, 0.0)
    require_sealed(run, stage)
    artifact = run.artifact(stage)
    with leases_on(artifact) as leases:
        while True:
            turn = acquire_shards(leases, run, todo)
            if turn.waited or made_since(artifact, turn.shards):
                status = stage_status(run, stage)
                todo = selected(run, status, wanted)
                if has_nothing_to_do(status, todo, wanted):
                    return already_done(run, status, time.monotonic() - started)
            part = among(todo, turn.shards)
            if part.missing or not todo.missing:  # none missing: the manifest alone is
                only_chosen = bool(wanted and part.missing)
                stage_run = StageRun(request, run, part, only_chosen=only_chosen)
                status = make_part(stage_run, leases, wanted)
                todo = selected(run, status, wanted)
                if status.sealed:
                    publish_asset(artifact)
                if has_nothing_to_do(status, todo, wanted):
                    return StageOutcome(status, "done", time.monotonic() - started)
            leases.release()


def make_part(stage_run: StageRun, leases: Leases, wanted: Sequence[int]) -> StageStatus:
    """The stage as it is once this run's part of what was missing is made.

    Raises:
        DeepSpecError: some of that part is still missing.
    """
    run, before = stage_run.run, stage_run.before
    try:
        with executor_for(stage_run, leases) as executor:
            work_off(stage_run, executor)
        after = stage_status(run, before.stage)
        left = among(selected(run, after, wanted), shards_to_lease(before))
    except DeepSpecError:
        stage_run.progress.close("failed")
        raise
    if left.missing or not (before.missing or after.sealed):
        stage_run.progress.close("failed")
        error = stage_run.failures.final_error(left, stage_run.request)
        raise error.with_traceback(None)
    stage_run.progress.close("done")
    return after


def has_nothing_to_do(status: StageStatus, todo: StageStatus, wanted: Sequence[int]) -> bool:
    """Whether this run is done with the stage; others than the wanted shards may be missing."""
    is_done = status.sealed or status.in_training
    return is_done or bool(wanted and status.missing and not todo.missing)


def made_since(artifact: Artifact, missing: Sequence[int]) -> bool:
    """Whether another run may have made some of what was missing; a stale record or manifest looks
    the same.
    """
    return artifact.manifest() is not None or bool(set(missing) & set(artifact.record_shards()))


def already_done(run: Run, status: StageStatus, seconds: float) -> StageOutcome:
    """The outcome of a stage in which this run made nothing."""
    state: State = "in training" if status.in_training else "already done"
    report_nothing_to_do(status, state)
    if status.sealed:
        publish_once(run.artifact(status.stage))
    return StageOutcome(status, state, seconds)


def among(todo: StageStatus, shards: Sequence[int]) -> StageStatus:
    """The status with only these of the missing shards; a stage without shards stays as it is."""
    if not STAGES[todo.stage].is_sharded:
        return todo
    known = set(shards)
    return todo._replace(missing=[shard for shard in todo.missing if shard in known])


@contextlib.contextmanager
def executor_for(stage_run: StageRun, leases: Leases) -> Iterator[Executor]:
    """Where the stage's work is done, by `resources.runner.kind`; a Ray cluster does stages with
    shards alone.
    """
    kind = stage_run.run.config.resources.runner.kind
    if kind == "ray" and stage_run.sharded:
        from flows.ray_executor import ray_executor

        with ray_executor(stage_run) as executor:
            yield executor
    elif kind == "workers" and STAGES[stage_run.stage].flow:
        yield PoolExecutor(stage_run, leases)
    else:
        yield LocalExecutor(stage_run)
