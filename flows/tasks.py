"""The stages of a run, one after the other: what is missing of each is made, and the artifact sealed if it is whole."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from prefect import get_run_logger

from deepspec.config import RunConfig
from deepspec.errors import DeepSpecError
from deepspec.launch import Request
from deepspec.lineage import artifact_of
from deepspec.stages import parse_shards, require_sealed, stage_status, stages_of
from flows.assets import publish_asset, publish_once
from flows.compatible import check_server
from flows.failures import publish_failure
from flows.hands import LocalHands
from flows.reporting import StageOutcome, State, publish_stages, show_nothing_to_do
from flows.request import open_run
from flows.selection import selected
from flows.stage_run import Hands, StageRun


def run_stages(request: Request, chosen: Sequence[str], shards: str | int = "") -> list[StageOutcome]:
    """Those of the chosen stages that the run has, in order, each sealed; the first that fails ends the run.

    With `shards` only these are made, and the stages after one that is not whole by then are left for another run.

    Raises:
        DeepSpecError: the request is wrong (before any work), or a stage failed.
    """
    check_server()
    asked, config = parse_shards(str(shards)), open_run(request)
    outcomes: list[StageOutcome] = []
    for stage in (stage for stage in stages_of(config) if stage in chosen):
        if asked and outcomes and not outcomes[-1].status.sealed:
            get_run_logger().warning("%s: left out, because shards of %s are still missing", stage, outcomes[-1].status.stage)
            break
        try:
            outcomes.append(run_stage(request, config, stage, asked))
        except DeepSpecError as error:
            publish_failure(config.name, error, request, stage)
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
    started, before = time.monotonic(), stage_status(config, stage)
    todo = selected(config, before, asked)
    if before.sealed or before.in_training or (asked and before.missing and not todo.missing):
        state: State = "in training" if before.in_training else "already done"
        show_nothing_to_do(before, state)
        if before.sealed:
            publish_once(artifact_of(config, stage))
        return StageOutcome(before, state, 0.0)
    require_sealed(config, stage)
    run = StageRun(request, config, todo, some=bool(asked and todo.missing))  # none missing: the manifest alone is
    with hands_for(run) as hands:
        run.work(hands)
    after = stage_status(config, stage)
    left = selected(config, after, asked)
    finished = after.sealed or (bool(asked) and not left.missing)
    run.board.close("done" if finished else "failed")
    if not finished:
        raise run.failure(left).with_traceback(None)
    if after.sealed:
        publish_asset(artifact_of(config, stage))
    return StageOutcome(after, "done", time.monotonic() - started)


@contextlib.contextmanager
def hands_for(run: StageRun) -> Iterator[Hands]:
    """Where the stage's work is done, as `resources.runner` says; a stage without shards is done where the flow runs."""
    if run.config.resources.runner == "ray" and run.sharded:
        from flows.ray_hands import ray_hands

        with ray_hands(run) as hands:
            yield hands
    else:
        yield LocalHands(run)
