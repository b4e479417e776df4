"""A stage at work: which failures are tried again, which count, and when no more is begun."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from prefect import flow

from deepspec.artifacts.run import open_run
from deepspec.artifacts.status import stage_status
from deepspec.errors import ChildFailed, ShardsFailed, TransientError
from deepspec.process.launch import RunRequest
from deepspec.process.progress_display import Progress
from deepspec.prompts.stage import run_prompts
from flows.reporting import watched_by
from flows.shard_scheduler import Lane
from flows.stage_run import StageRun

pytestmark = pytest.mark.filterwarnings("ignore:Artifact creation outside")

BUSY = {"what": "busy", "transient": True}
BAD = {"what": "bad", "transient": False}


def answers_run(run_file: Path, *overrides: str) -> StageRun:
    """The stage `answers` of a run with its prompts, of which four shards are missing."""
    request = RunRequest(str(run_file), ("resources.devices.type=auto", *overrides))
    run = open_run(request.source, request.overrides)
    run_prompts(run)
    return StageRun(request, run, stage_status(run, "answers")._replace(missing=[0, 1, 2, 3]))


def alone(stage_run: StageRun) -> tuple[StageRun, Lane]:
    """The stage with its only lane, to which everything was assigned."""
    lane = Lane("lane")
    stage_run.scheduler.lanes = [lane]
    assert stage_run.scheduler.next_group(lane) == [0, 1, 2]
    assert stage_run.scheduler.next_group(lane) == [3]
    return stage_run, lane


def waiting(stage_run: StageRun) -> list[int]:
    return [shard.number for shard in stage_run.scheduler._waiting]


def test_only_shards_that_failed_for_good_are_given_up(run_file: Path):
    stage_run, lane = alone(answers_run(run_file))
    failures = stage_run.failures
    stage_run.group_failed(ShardsFailed("", failures={1: BUSY, 2: BAD}), lane, [0, 1, 2])
    assert failures.for_good([0, 1, 2]) == [2]
    stage_run.group_failed(TransientError("killed"), lane, [0, 1])
    assert failures.for_good([0, 1, 2]) == [2] and failures.error is None
    stage_run.group_failed(ChildFailed("no reason"), lane, [3])
    after = stage_status(stage_run.run, "answers")
    assert isinstance(failures.final_error(after, stage_run.request), ChildFailed)


def test_a_group_that_fails_as_a_whole_counts_once(run_file: Path):
    stage_run, lane = alone(answers_run(run_file))
    stage_run.group_failed(ChildFailed("no reason"), lane, [0, 1])
    stage_run.group_failed(ChildFailed("no reason"), lane, [0, 1])
    stage_run.group_failed(ShardsFailed("", failures={2: BUSY, 3: BAD}), lane, [2, 3])
    assert stage_run.failures.lost == {0, 3} and not stage_run.failures.too_many


def test_a_shard_that_failed_for_good_counts_while_its_group_is_at_work_and_once(run_file: Path):
    """Groups last minutes: lanes that fail side by side would be stopped long after too much was
    lost.
    """
    seen: list[Progress] = []
    with watched_by(seen.append):
        stage_run, lane = alone(answers_run(run_file, "resources.retries.max_failed=0"))
        failed = {"event": "failed", "stage": "answers"}
        stage_run.on_event({**failed, "shard": 0, **BUSY}, lane=lane.name)
        assert not stage_run.failures.too_many
        stage_run.on_event({**failed, "shard": 1, **BAD}, lane=lane.name)
        assert stage_run.failures.too_many and stage_run.scheduler.stopped
        assert seen[-1].numbers["failed"] == 1
        stage_run.group_failed(ShardsFailed("", failures={0: BUSY, 1: BAD}), lane, [0, 1, 2])
        assert stage_run.failures.lost == {1}


def test_what_failed_for_good_is_not_tried_again_because_its_child_was_killed_after_it(
    run_file: Path,
):
    stage_run, lane = alone(answers_run(run_file))
    event = {"event": "failed", "stage": "answers", "shard": 1, **BAD}
    stage_run.on_event(event, lane=lane.name)
    stage_run.group_failed(TransientError("killed"), lane, [0, 1, 2])
    assert waiting(stage_run) == [0, 2]
    assert stage_run.failures.for_good([0, 1, 2]) == [1]


def test_shards_of_a_group_that_got_on_before_it_was_killed_are_not_counted_as_tried(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a worker that dies every minute, the last shards of a long group were given up before
    anything had begun them.
    """
    stage_run, lane = alone(answers_run(run_file, "resources.retries.times=1"))
    stage_run.scheduler.group_ended(lane, [3], 1, 1.0)
    group = [0, 1, 2]
    for left in ([1, 2], [2], [2]):
        monkeypatch.setattr(stage_run, "missing", lambda group, left=left: left)
        stage_run.group_failed(TransientError("killed"), lane, group)
        stage_run.scheduler.group_ended(lane, group, 0, 1.0)
        assert stage_run.failures.given_up == set()
        time.sleep(0.1)
        group = stage_run.scheduler.next_group(lane)
        assert group == left
    stage_run.group_failed(TransientError("killed"), lane, group)
    assert stage_run.failures.given_up == {2}, "twice nothing was made"


def test_what_fails_while_the_store_is_away_is_tried_again(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """The child fails because of it, and then it cannot be read what is missing of its group: the
    group was given up.
    """
    stage_run, lane = alone(answers_run(run_file))

    def away(group: Sequence[int]) -> list[int]:
        raise TransientError("the server did not answer")

    monkeypatch.setattr(stage_run, "missing", away)
    flow(stage_run.group_failed)(TransientError("the server did not answer"), lane, [0, 1, 2])
    assert waiting(stage_run) == [0, 1, 2]


def test_a_stage_without_shards_keeps_its_childs_error(run_file: Path):
    run = open_run(str(run_file))
    stage_run = StageRun(RunRequest(str(run_file)), run, stage_status(run, "train"))
    lane = Lane("lane")
    stage_run.scheduler.lanes = [lane]
    assert stage_run.scheduler.next_group(lane) == [0]
    stage_run.group_failed(ShardsFailed("the child's own", failures={7: BAD}), lane, [0])
    error = stage_run.failures.final_error(stage_status(run, "train"), stage_run.request)
    assert "the child's own" in str(error)
